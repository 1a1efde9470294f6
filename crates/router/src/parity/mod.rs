//! Token parity: whether the router cuts a prompt into the tokens that a replica computes.
//!
//! A router that hashes other tokens than the replicas cache finds nothing, with every light green. So tokenizer and
//! template are the replica's own ([`watch`] fetches them, or `--tokenizer` names them), the way from a request to
//! tokens is the one that the replica takes ([`servelab_front::prompts`]), and still nobody is believed: at its
//! registration, after a new start and again and again the replica tokenises a few prompts that the router has
//! tokenised too ([`canary`]). A replica without parity is matched by text (see [`crate::prompt`]), which finds nearly
//! as much, and everybody can see it.

pub mod canary;
pub mod desk;
pub mod tokeniser;
pub mod watch;

use std::sync::Arc;

use self::tokeniser::Tokeniser;

/// What is known of one replica.
#[derive(Clone, Debug, Default)]
pub enum Parity {
    /// Not asked yet, or it does not say what it tokenises with. Matched by text.
    #[default]
    Unknown,
    /// As [`Parity::Unknown`], and why.
    Unclear(String),
    /// The router's tokens are its own.
    Kept(Arc<Tokeniser>),
    /// They are not: what differed. Matched by text.
    Lost(String),
}

impl Parity {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unknown | Self::Unclear(_) => "unknown",
            Self::Kept(_) => "kept",
            Self::Lost(_) => "lost",
        }
    }

    /// Why there is none.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::Unclear(why) | Self::Lost(why) => Some(why),
            Self::Unknown | Self::Kept(_) => None,
        }
    }

    /// Whether it says the same.
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kept(one), Self::Kept(other)) => one.id() == other.id(),
            (one, other) => one.name() == other.name() && one.detail() == other.detail(),
        }
    }
}
