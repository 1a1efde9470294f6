//! The rules by which a replica can be chosen.

use std::str::FromStr;

/// How a replica is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Where the request costs least, in seconds: see [`super::cost`].
    #[default]
    Cost,
    RoundRobin,
    Random,
    /// Fewest requests.
    LeastRequests,
    /// The one of two random replicas that has fewer requests (Mitzenmacher 2001).
    PowerOfTwo,
    /// The one of two random replicas with the lower product of latency and requests, where the latency jumps to
    /// every peak and comes down slowly (Finagle, linkerd).
    PeakEwma,
    /// By the beginning of the prompt, or the session if there is one; no replica gets more than 1.25 times the mean
    /// (Mirrokni, Thorup and Zadimoghaddam 2018, consistent hashing with bounded loads).
    ConsistentHash,
    /// By the session alone, whatever the load.
    Session,
    /// The longest prefix, whatever the load: goes wrong when all prompts share their beginning.
    LongestPrefix,
}

/// A name that no policy has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown policy {name:?}; there are {}", Policy::ALL.map(Policy::name).join(", "))]
pub struct UnknownPolicy {
    name: String,
}

impl Policy {
    pub const ALL: [Self; 9] = [
        Self::Cost,
        Self::RoundRobin,
        Self::Random,
        Self::LeastRequests,
        Self::PowerOfTwo,
        Self::PeakEwma,
        Self::ConsistentHash,
        Self::Session,
        Self::LongestPrefix,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::RoundRobin => "round_robin",
            Self::Random => "random",
            Self::LeastRequests => "least_requests",
            Self::PowerOfTwo => "power_of_two",
            Self::PeakEwma => "peak_ewma",
            Self::ConsistentHash => "consistent_hash",
            Self::Session => "session",
            Self::LongestPrefix => "longest_prefix",
        }
    }

    /// Whether it looks at what the prompt says, so that the prompt has to be read and hashed.
    pub fn reads_prompt(self) -> bool {
        matches!(self, Self::Cost | Self::ConsistentHash | Self::LongestPrefix)
    }
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| UnknownPolicy { name: name.chars().take(60).collect() })
    }
}

/// Why this replica and no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is only one.
    Only,
    /// None holds more of the prompt.
    Prefix,
    /// Another holds more of the prompt, but waiting for it would cost more than computing it again.
    Spill,
    /// The least loaded, where no prefix or session had a say.
    Load,
    /// By hash, of the session or of the prompt's beginning.
    Hash,
    /// By turn or by lot.
    Turn,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Self::Only => "only",
            Self::Prefix => "prefix",
            Self::Spill => "spill",
            Self::Load => "load",
            Self::Hash => "hash",
            Self::Turn => "turn",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_is_found_by_its_name_and_an_unknown_one_lists_them() {
        for policy in Policy::ALL {
            assert_eq!(policy.name().parse(), Ok(policy));
        }
        let message = "cache_aware".parse::<Policy>().unwrap_err().to_string();
        assert!(
            message.starts_with("unknown policy \"cache_aware\"; there are cost, round_robin, "),
            "{message}"
        );
    }
}
