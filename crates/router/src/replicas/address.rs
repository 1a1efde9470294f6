//! Where a replica is.

use std::fmt;
use std::str::FromStr;

use http::Uri;
use http::uri::Authority;

/// `http://HOST:PORT`. The routes of a replica begin at its root.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(String);

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no address of a replica: {problem}; give it as http://HOST:PORT")]
pub struct BadAddress {
    given: String,
    problem: &'static str,
}

/// Longest address: it becomes a label of metrics.
const MAX_BYTES: usize = 256;

impl Address {
    /// `HOST:PORT`.
    pub fn authority(&self) -> &str {
        &self.0
    }

    /// A hash of it, the same in every router.
    pub fn key(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(self.0.as_bytes())
    }

    /// The address of something there. `None` if the two make no URL.
    pub fn uri(&self, path_and_query: &str) -> Option<Uri> {
        Uri::builder().scheme("http").authority(self.authority()).path_and_query(path_and_query).build().ok()
    }
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = |problem| BadAddress { given: text.chars().take(MAX_BYTES).collect(), problem };
        if text.len() > MAX_BYTES {
            return Err(bad("it is too long"));
        }
        let rest = match text.split_once("://") {
            Some(("http", rest)) => rest,
            Some(("https", _)) => return Err(bad("replicas are spoken to in the clear, inside one network")),
            Some(_) => return Err(bad("the scheme is not http")),
            None => text,
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains(['/', '?', '#', '@']) {
            return Err(bad("it has more than host and port"));
        }
        let parsed: Authority = authority.parse().map_err(|_| bad("host or port cannot be read"))?;
        match (parsed.host().is_empty(), parsed.port_u16()) {
            (false, Some(port)) if port > 0 => Ok(Self(authority.to_ascii_lowercase())),
            (true, _) => Err(bad("the host is missing")),
            _ => Err(bad("the port is missing")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "http://{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (text, shown) in [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("http://Replica-0.svc:80/", "http://replica-0.svc:80"),
            ("[::1]:9", "http://[::1]:9"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_address_is_told_why() {
        for (text, problem) in [
            ("https://a:1", "in the clear"),
            ("ftp://a:1", "not http"),
            ("http://a", "port is missing"),
            ("http://a:0", "port is missing"),
            ("http://:80", "missing"),
            ("http://a:1/v1", "more than host and port"),
            ("http://user@a:1", "more than host and port"),
            ("http://a:99999", "port"),
            ("", ""),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(problem) && error.ends_with("give it as http://HOST:PORT"), "{error}");
        }
    }
}
