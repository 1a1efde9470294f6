//! What a replica's prefix cache gains and loses, for a router that wants to know and not to guess.
//!
//! The events are vLLM's: a block that was stored, with the tokens in it and the block before it; blocks that were
//! removed; everything gone. They travel in batches with sequence numbers, one a step of the engine, in two ways:
//! as server-sent events over HTTP, which begin with a snapshot ([`stream`]), and as vLLM sends them over ZeroMQ
//! ([`zmq`]).
//!
//! Names of blocks are the sender's own and mean nothing elsewhere: whoever reads the events builds its own hash chain
//! from the tokens. A servelab replica names its blocks by the hash of `engine/src/block_hash.rs`, as 16 bytes, the most
//! significant first.

pub mod stream;
pub mod zmq;

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a block is called. As JSON a number, or bytes in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockName {
    Bytes(Box<[u8]>),
    Number(u64),
}

impl From<u128> for BlockName {
    fn from(hash: u128) -> Self {
        Self::Bytes(Box::new(hash.to_be_bytes()))
    }
}

impl Serialize for BlockName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_u64(*number),
            Self::Bytes(bytes) => {
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                serializer.serialize_str(&hex)
            }
        }
    }
}

impl<'de> Deserialize<'de> for BlockName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = BlockName;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a number, or bytes in hexadecimal")
            }

            fn visit_u64<E>(self, number: u64) -> Result<BlockName, E> {
                Ok(BlockName::Number(number))
            }

            fn visit_str<E: serde::de::Error>(self, hex: &str) -> Result<BlockName, E> {
                let wrong = || E::invalid_value(serde::de::Unexpected::Str(hex), &self);
                if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
                    return Err(wrong());
                }
                let byte = |at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
                let bytes: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(byte).collect();
                Ok(BlockName::Bytes(bytes.ok_or_else(wrong)?.into()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// One change of the cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum KvEvent {
    BlockStored(BlockStored),
    BlockRemoved(BlockRemoved),
    AllBlocksCleared,
}

/// Blocks that follow each other in one prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockStored {
    pub block_hashes: Vec<BlockName>,
    /// The block before the first of them; absent if they begin a prompt.
    pub parent_block_hash: Option<BlockName>,
    /// `[block_hashes, block_size]`, one block after the other.
    pub token_ids: Vec<u32>,
    /// In tokens.
    pub block_size: u32,
    /// Of the hash chain, where the request named a `cache_salt`: a hash of it, never the salt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt_hash: Option<u64>,
    /// Where the block is; absent or `GPU` is the memory that the model computes in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<String>,
    /// Of an engine with several caches, which one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_idx: Option<u32>,
    /// Something besides the tokens went into the names: an adapter, an image, a salt that is not told.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_other_keys: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BlockRemoved {
    pub block_hashes: Vec<BlockName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_idx: Option<u32>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_reads_as_vllms_does_with_names_in_hexadecimal() {
        let stored = KvEvent::BlockStored(BlockStored {
            block_hashes: vec![0x0102_u128.into()],
            parent_block_hash: Some(BlockName::Number(7)),
            token_ids: vec![1, 2],
            block_size: 2,
            ..BlockStored::default()
        });
        let text = json!({
            "type": "BlockStored", "block_hashes": ["00000000000000000000000000000102"],
            "parent_block_hash": 7, "token_ids": [1, 2], "block_size": 2,
        });
        assert_eq!(serde_json::to_value(&stored).unwrap(), text);
        assert_eq!(serde_json::from_value::<KvEvent>(text).unwrap(), stored);
        assert_eq!(
            serde_json::to_value(KvEvent::AllBlocksCleared).unwrap(),
            json!({"type": "AllBlocksCleared"})
        );
    }

    #[test]
    fn a_name_that_is_no_name_is_refused() {
        for wrong in ["\"abc\"", "\"zz\"", "-1", "1.5", "\"ää\"", "null"] {
            assert!(serde_json::from_str::<BlockName>(wrong).is_err(), "{wrong}");
        }
    }
}
