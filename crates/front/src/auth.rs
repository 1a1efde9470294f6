//! API keys.

use http::{HeaderMap, header};
use servelab_telemetry::Secret;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// Keys are padded to that many bytes before they are compared.
pub const MAX_KEY_BYTES: usize = 256;

/// Why a request may not come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("no API key was given; send it as \"Authorization: Bearer KEY\"")]
    Missing,
    #[error("the API key is not known here")]
    Unknown,
}

/// The keys that open this server. How long a comparison takes does not depend on the key presented,
/// on the keys known, nor on where they differ: all are padded to one length and all are compared.
pub struct ApiKeys {
    keys: Vec<Padded>,
}

struct Padded {
    bytes: [u8; MAX_KEY_BYTES],
    length: u64,
}

impl Padded {
    /// `None` if the key is empty or too long.
    fn new(key: &[u8]) -> Option<Self> {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return None;
        }
        let mut bytes = [0; MAX_KEY_BYTES];
        bytes[..key.len()].copy_from_slice(key);
        Some(Self { bytes, length: key.len() as u64 })
    }

    fn equals(&self, other: &Self) -> Choice {
        self.bytes[..].ct_eq(&other.bytes[..]) & self.length.ct_eq(&other.length)
    }
}

/// A key that cannot be used. Says which, not what.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "API key number {number} is empty or longer than {MAX_KEY_BYTES} bytes; give 1 to {MAX_KEY_BYTES} bytes"
)]
pub struct UnusableKey {
    pub number: usize,
}

impl ApiKeys {
    /// No keys: everybody may come in.
    ///
    /// # Errors
    /// If a key is empty or longer than [`MAX_KEY_BYTES`].
    pub fn new(keys: &[Secret]) -> Result<Self, UnusableKey> {
        let keys = keys
            .iter()
            .enumerate()
            .map(|(at, key)| Padded::new(key.expose().as_bytes()).ok_or(UnusableKey { number: at + 1 }));
        Ok(Self { keys: keys.collect::<Result<_, _>>()? })
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Which key the request presents, counted from 0; `None` where no keys are asked for.
    ///
    /// # Errors
    /// If keys are asked for and the request presents none of them.
    pub fn check(&self, headers: &HeaderMap) -> Result<Option<usize>, KeyError> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        let presented = bearer(headers).ok_or(KeyError::Missing)?;
        let presented = Padded::new(presented).ok_or(KeyError::Unknown)?;
        let (mut found, mut which) = (Choice::from(0), 0_u64);
        for (at, key) in (0..).zip(&self.keys) {
            let equal = key.equals(&presented);
            which.conditional_assign(&at, equal);
            found |= equal;
        }
        if bool::from(found) { Ok(Some(which as usize)) } else { Err(KeyError::Unknown) }
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(keys: &[&str]) -> Result<ApiKeys, UnusableKey> {
        ApiKeys::new(&keys.iter().map(|key| Secret::new(*key)).collect::<Vec<_>>())
    }

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn any_of_the_keys_opens_and_nothing_else_does() {
        let keys = keys(&["first", "second"]).unwrap();
        for open in ["Bearer first", "bearer second", "BEARER  first "] {
            assert!(keys.check(&with(open)).is_ok(), "{open}");
        }
        for shut in ["Bearer firs", "Bearer first\0", "Bearer firstsecond", "Basic first", "first", "Bearer "]
        {
            if let Ok(value) = shut.parse() {
                let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value)]);
                assert!(keys.check(&headers).is_err(), "{shut}");
            }
        }
        assert!(keys.check(&HeaderMap::new()).is_err());
        assert!(keys.check(&with(&format!("Bearer {}", "x".repeat(9000)))).is_err());
    }

    #[test]
    fn without_keys_everybody_may_come_in() {
        assert!(keys(&[]).unwrap().check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn the_key_is_told_by_its_place() {
        let keys = keys(&["first", "second", "third"]).unwrap();
        let places = ["first", "second", "third"].map(|key| keys.check(&with(&format!("Bearer {key}"))));
        assert_eq!(places, [Ok(Some(0)), Ok(Some(1)), Ok(Some(2))]);
        assert_eq!(keys.check(&with("Bearer fourth")), Err(KeyError::Unknown));
        assert_eq!(keys.check(&HeaderMap::new()), Err(KeyError::Missing));
    }

    #[test]
    fn an_unusable_key_is_named_by_its_number() {
        assert_eq!(keys(&["good", ""]).err(), Some(UnusableKey { number: 2 }));
        assert_eq!(keys(&[&"x".repeat(257)]).err(), Some(UnusableKey { number: 1 }));
    }
}
