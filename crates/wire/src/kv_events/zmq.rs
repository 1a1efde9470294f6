//! The events as vLLM publishes them over ZeroMQ: three frames, the topic, the sequence number as eight bytes with the
//! most significant first, and a batch in MessagePack.
//!
//! vLLM has had two encodings. Older versions write structs as arrays, the fields in their order and those at the end
//! left out; newer ones as maps. A batch is `[ts, events, data_parallel_rank]`, an event `["BlockStored", ...]` or
//! `{"type": "BlockStored", ...}`. Both are read; which one is written is a choice.
//! (vLLM: `vllm/distributed/kv_events.py`.)

use rmpv::Value;

use super::{BlockName, BlockRemoved, BlockStored, KvEvent};

/// The number that ends a replay: -1.
pub const REPLAY_END: [u8; 8] = u64::MAX.to_be_bytes();

/// How structs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// As newer versions of vLLM do.
    #[default]
    Map,
    /// As older versions do.
    Array,
}

/// The third frame.
#[derive(Clone, Debug, PartialEq)]
pub struct KvBatch {
    /// Seconds since the Unix epoch.
    pub ts: f64,
    pub events: Vec<KvEvent>,
    pub data_parallel_rank: Option<u32>,
}

/// A frame that is no batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadBatch(String);

/// Deepest nesting that is read, and most events of a batch and blocks of an event.
const MAX_DEPTH: usize = 16;
const MAX_ITEMS: usize = 1 << 20;

impl KvBatch {
    /// # Errors
    /// If the bytes are no MessagePack, or no batch. Unknown fields are skipped, an unknown event is an error.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, BadBatch> {
        let value = rmpv::decode::read_value_with_max_depth(&mut bytes, MAX_DEPTH)
            .map_err(|error| BadBatch(format!("the frame is no MessagePack: {error}")))?;
        let fields = Fields::of(&value, &["ts", "events", "data_parallel_rank"], 0)?;
        let ts = fields.get("ts").as_f64().ok_or_else(|| BadBatch("ts is no number".into()))?;
        let events = list(fields.get("events"), "events")?.iter().map(event).collect::<Result<_, _>>()?;
        let data_parallel_rank = small(fields.get("data_parallel_rank"));
        Ok(Self { ts, events, data_parallel_rank })
    }

    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        let events = Value::Array(self.events.iter().map(|event| event_value(event, encoding)).collect());
        let rank = self.data_parallel_rank.map_or(Value::Nil, Value::from);
        let fields = vec![("ts", self.ts.into()), ("events", events), ("data_parallel_rank", rank)];
        let mut bytes = Vec::new();
        // Writing into memory does not fail.
        let _ = rmpv::encode::write_value(&mut bytes, &value(None, fields, encoding));
        bytes
    }
}

/// The fields of a struct, whichever way it was written.
struct Fields<'a> {
    names: &'static [&'static str],
    value: &'a Value,
    /// Where in an array the first field stands.
    first: usize,
}

static NIL: Value = Value::Nil;

impl<'a> Fields<'a> {
    fn of(value: &'a Value, names: &'static [&'static str], first: usize) -> Result<Self, BadBatch> {
        match value {
            Value::Array(_) | Value::Map(_) => Ok(Self { names, value, first }),
            _ => Err(BadBatch(format!("{} is neither an array nor a map", names[0]))),
        }
    }

    /// Nil if it is absent.
    fn get(&self, name: &str) -> &'a Value {
        let found = match self.value {
            Value::Map(pairs) => pairs.iter().find(|(key, _)| key.as_str() == Some(name)).map(|pair| &pair.1),
            Value::Array(items) => {
                let at = self.names.iter().position(|known| *known == name);
                at.and_then(|at| items.get(self.first + at))
            }
            _ => None,
        };
        found.unwrap_or(&NIL)
    }
}

/// In the order in which vLLM's arrays have them.
const STORED: &[&str] = &[
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
];
const REMOVED: &[&str] = &["block_hashes", "medium", "group_idx"];

fn event(value: &Value) -> Result<KvEvent, BadBatch> {
    let tag = match value {
        Value::Array(items) => items.first().and_then(Value::as_str),
        _ => Fields::of(value, STORED, 1)?.get("type").as_str(),
    };
    match tag {
        Some("BlockStored") => stored(&Fields::of(value, STORED, 1)?).map(KvEvent::BlockStored),
        Some("BlockRemoved") => {
            let fields = Fields::of(value, REMOVED, 1)?;
            Ok(KvEvent::BlockRemoved(BlockRemoved {
                block_hashes: names(fields.get("block_hashes"))?,
                medium: text(fields.get("medium")),
                group_idx: small(fields.get("group_idx")),
            }))
        }
        Some("AllBlocksCleared") => Ok(KvEvent::AllBlocksCleared),
        Some(other) => {
            Err(BadBatch(format!("the event {:?} is unknown", other.chars().take(64).collect::<String>())))
        }
        None => Err(BadBatch("an event has no name".into())),
    }
}

fn stored(fields: &Fields<'_>) -> Result<BlockStored, BadBatch> {
    let parent = fields.get("parent_block_hash");
    let token = |value: &Value| small(value).ok_or_else(|| BadBatch("a token id is no 32-bit number".into()));
    let extra_keys = match fields.get("extra_keys") {
        Value::Array(keys) => keys.iter().any(|key| !key.is_nil()),
        key => !key.is_nil(),
    };
    let adapter = !fields.get("lora_id").is_nil() || !fields.get("lora_name").is_nil();
    Ok(BlockStored {
        block_hashes: names(fields.get("block_hashes"))?,
        parent_block_hash: if parent.is_nil() { None } else { Some(name(parent)?) },
        token_ids: list(fields.get("token_ids"), "token_ids")?.iter().map(token).collect::<Result<_, _>>()?,
        block_size: small(fields.get("block_size"))
            .ok_or_else(|| BadBatch("block_size is no number".into()))?,
        salt_hash: None,
        medium: text(fields.get("medium")),
        group_idx: small(fields.get("group_idx")),
        has_other_keys: adapter || extra_keys,
    })
}

fn list<'a>(value: &'a Value, what: &str) -> Result<&'a [Value], BadBatch> {
    match value {
        Value::Array(items) if items.len() <= MAX_ITEMS => Ok(items),
        Value::Array(items) => {
            Err(BadBatch(format!("{what} has {} entries, more than {MAX_ITEMS}", items.len())))
        }
        _ => Err(BadBatch(format!("{what} is no list"))),
    }
}

fn names(value: &Value) -> Result<Vec<BlockName>, BadBatch> {
    list(value, "block_hashes")?.iter().map(name).collect()
}

fn name(value: &Value) -> Result<BlockName, BadBatch> {
    match value {
        Value::Binary(bytes) => Ok(BlockName::Bytes(bytes.as_slice().into())),
        // Python's own hash may be negative; its 64 bits are what tells it from others.
        Value::Integer(number) => {
            let signed = || number.as_i64().map(i64::cast_unsigned);
            number
                .as_u64()
                .or_else(signed)
                .map(BlockName::Number)
                .ok_or_else(|| BadBatch("a hash is too large".into()))
        }
        _ => Err(BadBatch("a block hash is neither bytes nor a number".into())),
    }
}

fn small(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn event_value(event: &KvEvent, encoding: Encoding) -> Value {
    match event {
        KvEvent::AllBlocksCleared => value(Some("AllBlocksCleared"), Vec::new(), encoding),
        KvEvent::BlockRemoved(removed) => {
            let fields = vec![
                ("block_hashes", names_value(&removed.block_hashes)),
                ("medium", text_value(removed.medium.as_deref())),
                ("group_idx", removed.group_idx.map_or(Value::Nil, Value::from)),
            ];
            value(Some("BlockRemoved"), fields, encoding)
        }
        KvEvent::BlockStored(stored) => {
            let tokens = stored.token_ids.iter().map(|token| Value::from(*token)).collect();
            let fields = vec![
                ("block_hashes", names_value(&stored.block_hashes)),
                ("parent_block_hash", stored.parent_block_hash.as_ref().map_or(Value::Nil, name_value)),
                ("token_ids", Value::Array(tokens)),
                ("block_size", stored.block_size.into()),
                ("lora_id", Value::Nil),
                ("medium", text_value(stored.medium.as_deref())),
                ("lora_name", Value::Nil),
                ("extra_keys", extra_keys(stored)),
                ("group_idx", stored.group_idx.map_or(Value::Nil, Value::from)),
            ];
            value(Some("BlockStored"), fields, encoding)
        }
    }
}

/// vLLM tells what else went into a block's name, for each block. A salt goes into all of them here.
fn extra_keys(stored: &BlockStored) -> Value {
    let Some(salt) = stored.salt_hash else { return Value::Nil };
    let keys = Value::Array(vec![Value::from(format!("salt:{salt:016x}"))]);
    Value::Array(vec![keys; stored.block_hashes.len()])
}

fn names_value(names: &[BlockName]) -> Value {
    Value::Array(names.iter().map(name_value).collect())
}

fn name_value(name: &BlockName) -> Value {
    match name {
        BlockName::Bytes(bytes) => Value::Binary(bytes.to_vec()),
        BlockName::Number(number) => (*number).into(),
    }
}

fn text_value(text: Option<&str>) -> Value {
    text.map_or(Value::Nil, Value::from)
}

/// A struct, with its name if it is one of several kinds. vLLM's readers take fields after the required ones as absent
/// when they are nil; an array ends with its last one that is not.
fn value(tag: Option<&str>, fields: Vec<(&str, Value)>, encoding: Encoding) -> Value {
    match encoding {
        Encoding::Map => {
            let tag = tag.map(|tag| (Value::from("type"), Value::from(tag)));
            let optional = ["extra_keys", "group_idx", "data_parallel_rank"];
            let written =
                fields.into_iter().filter(|(name, value)| !(optional.contains(name) && value.is_nil()));
            Value::Map(tag.into_iter().chain(written.map(|(name, value)| (name.into(), value))).collect())
        }
        Encoding::Array => {
            let mut items: Vec<Value> = tag.map(Value::from).into_iter().collect();
            // Readers want the medium even where there is none.
            let required =
                items.len() + fields.iter().position(|(name, _)| *name == "medium").map_or(0, |at| at + 1);
            items.extend(fields.into_iter().map(|(_, value)| value));
            while items.len() > required && items.last().is_some_and(Value::is_nil) {
                items.pop();
            }
            Value::Array(items)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch() -> KvBatch {
        let stored = BlockStored {
            block_hashes: vec![BlockName::from(1), BlockName::Number(9)],
            token_ids: vec![1, 2, 3, 4_000_000_000],
            block_size: 2,
            medium: Some("GPU".into()),
            ..BlockStored::default()
        };
        let removed = BlockRemoved {
            block_hashes: vec![BlockName::Number(u64::MAX)],
            medium: None,
            group_idx: Some(1),
        };
        let events =
            vec![KvEvent::BlockStored(stored), KvEvent::BlockRemoved(removed), KvEvent::AllBlocksCleared];
        KvBatch { ts: 1.5, events, data_parallel_rank: Some(0) }
    }

    #[test]
    fn what_was_written_either_way_is_read() {
        for encoding in [Encoding::Map, Encoding::Array] {
            assert_eq!(KvBatch::decode(&batch().encode(encoding)).unwrap(), batch());
        }
    }

    /// Bytes that msgspec wrote of vLLM's structs, as maps and as arrays.
    #[test]
    fn vllms_own_bytes_are_read() {
        let map = "83a27473cb3ff8000000000000a66576656e74739487a474797065ab426c6f636b53746f726564ac626c6f63\
             6b5f68617368657392ccc8cf8000000000000001b1706172656e745f626c6f636b5f68617368c0a9746f6b65\
             6e5f6964739401020304aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da347505588a4\
             74797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391c4020102b1706172656e745f626c\
             6f636b5f68617368ccc8a9746f6b656e5f696473920506aa626c6f636b5f73697a6502a76c6f72615f6964c0\
             a66d656469756dc0aa65787472615f6b6579739191a473616c7483a474797065ac426c6f636b52656d6f7665\
             64ac626c6f636b5f68617368657391d085a66d656469756dc081a474797065b0416c6c426c6f636b73436c65\
             61726564b2646174615f706172616c6c656c5f72616e6b00";
        let array = "93cb3ff8000000000000949aab426c6f636b53746f72656492ccc8cf8000000000000001c0940102030402c0\
             a3475055c0c0c09aab426c6f636b53746f72656491c4020102ccc892050602c0c0c09191a473616c74c094ac\
             426c6f636b52656d6f76656491d085c0c091b0416c6c426c6f636b73436c656172656400";
        let stored = BlockStored {
            block_hashes: vec![BlockName::Number(200), BlockName::Number((1 << 63) + 1)],
            token_ids: vec![1, 2, 3, 4],
            block_size: 2,
            medium: Some("GPU".into()),
            ..BlockStored::default()
        };
        let salted = BlockStored {
            block_hashes: vec![BlockName::Bytes([1, 2].into())],
            parent_block_hash: Some(BlockName::Number(200)),
            token_ids: vec![5, 6],
            block_size: 2,
            has_other_keys: true,
            ..BlockStored::default()
        };
        let removed = BlockRemoved {
            block_hashes: vec![BlockName::Number((-123_i64).cast_unsigned())],
            ..BlockRemoved::default()
        };
        let events = vec![
            KvEvent::BlockStored(stored),
            KvEvent::BlockStored(salted),
            KvEvent::BlockRemoved(removed),
            KvEvent::AllBlocksCleared,
        ];
        let expected = KvBatch { ts: 1.5, events, data_parallel_rank: Some(0) };
        for text in [map, array] {
            assert_eq!(KvBatch::decode(&hex(text)).unwrap(), expected);
        }
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn blocks_of_adapters_and_salts_say_that_tokens_are_not_all() {
        let mut salted = batch();
        if let KvEvent::BlockStored(stored) = &mut salted.events[0] {
            stored.salt_hash = Some(7);
        }
        for encoding in [Encoding::Map, Encoding::Array] {
            let read = KvBatch::decode(&salted.encode(encoding)).unwrap();
            assert!(matches!(&read.events[0], KvEvent::BlockStored(stored) if stored.has_other_keys));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0..100usize) {
            let _ = KvBatch::decode(&bytes);
            let whole = batch().encode(Encoding::Map);
            prop_assert!(KvBatch::decode(&whole[..cut.min(whole.len() - 1)]).is_err());
        }
    }
}
