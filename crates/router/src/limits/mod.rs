//! What one API key may use: requests a minute and tokens a minute, counted in this process.
//!
//! At the door a request reserves its prompt, by the router's estimate, and all that it may generate; when its answer
//! tells what was used, the rest is given back. Each router counts for itself: with several of them a key has the
//! limit at each.

pub mod bucket;
pub mod queue;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use self::bucket::Bucket;

/// What one key may use; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub requests_per_minute: Option<u64>,
    pub tokens_per_minute: Option<u64>,
}

/// Which limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Requests,
    Tokens,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

/// A request that would exceed a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub kind: Kind,
    limit: u64,
    wanted: u64,
    /// `None` if it exceeds what a whole minute gives.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, wanted, .. } = self;
        match (self.kind, self.retry_after) {
            (Kind::Requests, after) => write!(
                formatter,
                "the limit of {limit} requests a minute is reached; try again in {} s",
                seconds(after.unwrap_or_default())
            ),
            (Kind::Tokens, Some(after)) => write!(
                formatter,
                "the limit of {limit} tokens a minute is reached, this request counts {wanted} (prompt and \
                 max_tokens); try again in {} s",
                seconds(after)
            ),
            (Kind::Tokens, None) => write!(
                formatter,
                "this request counts {wanted} tokens (prompt and max_tokens) and the limit is {limit} a minute; \
                 shorten the prompt or lower max_tokens"
            ),
        }
    }
}

fn seconds(time: Duration) -> u64 {
    time.as_secs_f64().ceil().max(1.0) as u64
}

#[derive(Debug)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// The buckets of every key.
#[derive(Debug)]
pub struct Limits {
    keys: Vec<Mutex<Buckets>>,
}

impl Limits {
    /// One entry a key; without keys one for everybody.
    pub fn new(limits: &[KeyLimits], now: Duration) -> Self {
        let buckets = |limits: &KeyLimits| {
            let bucket = |limit: Option<u64>| limit.map(|limit| Bucket::new(limit, now));
            let (requests, tokens) = (bucket(limits.requests_per_minute), bucket(limits.tokens_per_minute));
            Mutex::new(Buckets { requests, tokens })
        };
        Self { keys: limits.iter().map(buckets).collect() }
    }

    /// Takes one request and `tokens` tokens, both or neither.
    ///
    /// # Errors
    /// If a limit would be exceeded.
    pub fn reserve(self: &Arc<Self>, key: usize, now: Duration, tokens: u64) -> Result<Reservation, Refused> {
        let mut buckets = self.buckets(key);
        let Buckets { requests, tokens: of_tokens } = &mut *buckets;
        for (kind, bucket, wanted) in
            [(Kind::Requests, &mut *requests, 1), (Kind::Tokens, &mut *of_tokens, tokens)]
        {
            let Some(bucket) = bucket else { continue };
            let retry_after = bucket.wait(now, wanted);
            if !retry_after.is_some_and(|wait| wait.is_zero()) {
                return Err(Refused { kind, limit: bucket.per_minute(), wanted, retry_after });
            }
        }
        for (bucket, wanted) in [(requests, 1), (of_tokens, tokens)] {
            if let Some(bucket) = bucket {
                bucket.take(now, wanted);
            }
        }
        drop(buckets);
        Ok(Reservation { limits: self.clone(), key, tokens })
    }

    /// OpenAI's `x-ratelimit-*` headers as they stand for a key.
    pub fn write_headers(&self, key: usize, now: Duration, headers: &mut HeaderMap) {
        let mut buckets = self.buckets(key);
        let Buckets { requests, tokens } = &mut *buckets;
        for (kind, bucket) in [(Kind::Requests, requests), (Kind::Tokens, tokens)] {
            let Some(bucket) = bucket else { continue };
            let reset = format!("{:.3}s", bucket.reset(now).as_secs_f64());
            let values = [
                ("limit", bucket.per_minute().to_string()),
                ("remaining", bucket.remaining(now).to_string()),
                ("reset", reset),
            ];
            for (what, value) in values {
                let name = HeaderName::try_from(format!("x-ratelimit-{what}-{}", kind.name()));
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
        }
    }

    fn buckets(&self, key: usize) -> MutexGuard<'_, Buckets> {
        self.keys[key].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a request took at the door. Dropped unsettled it keeps all of it: the request may have been computed.
#[derive(Debug)]
pub struct Reservation {
    limits: Arc<Limits>,
    key: usize,
    tokens: u64,
}

impl Reservation {
    /// The request used that many tokens: gives the rest back, or takes what is missing.
    pub fn settle(self, now: Duration, used: u64) {
        if let Some(bucket) = &mut self.limits.buckets(self.key).tokens {
            if used <= self.tokens {
                bucket.give_back(self.tokens - used);
            } else {
                bucket.take(now, used - self.tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn limits(requests: Option<u64>, tokens: Option<u64>) -> Arc<Limits> {
        let key = KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens };
        Arc::new(Limits::new(&[key, key], NOW))
    }

    #[test]
    fn a_refused_request_takes_nothing_and_keys_do_not_share() {
        let limits = limits(Some(2), Some(100));
        let refused = limits.reserve(0, NOW, 101).unwrap_err();
        assert_eq!((refused.kind, refused.retry_after), (Kind::Tokens, None));
        limits.reserve(0, NOW, 60).unwrap();
        let refused = limits.reserve(0, NOW, 60).unwrap_err();
        assert_eq!(refused.retry_after, Some(Duration::from_secs(12)));
        limits.reserve(0, NOW, 40).unwrap();
        let refused = limits.reserve(0, NOW, 0).unwrap_err();
        assert_eq!(refused.to_string(), "the limit of 2 requests a minute is reached; try again in 30 s");
        limits.reserve(1, NOW, 100).unwrap();
    }

    #[test]
    fn what_was_not_used_comes_back_and_what_was_used_beyond_is_owed() {
        let limits = limits(None, Some(100));
        limits.reserve(0, NOW, 90).unwrap().settle(NOW, 20);
        limits.reserve(0, NOW, 80).unwrap().settle(NOW, 130);
        let refused = limits.reserve(0, NOW, 10).unwrap_err();
        assert_eq!(refused.retry_after, Some(Duration::from_secs(36)), "50 are owed, 10 are wanted");
    }

    #[test]
    fn headers_are_openais() {
        let limits = limits(Some(60), Some(6000));
        limits.reserve(0, NOW, 1000).unwrap();
        let mut headers = HeaderMap::new();
        limits.write_headers(0, NOW, &mut headers);
        let mut lines: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        assert_eq!(
            lines,
            [
                "x-ratelimit-limit-requests: 60",
                "x-ratelimit-limit-tokens: 6000",
                "x-ratelimit-remaining-requests: 59",
                "x-ratelimit-remaining-tokens: 5000",
                "x-ratelimit-reset-requests: 1.000s",
                "x-ratelimit-reset-tokens: 10.000s",
            ]
        );
    }
}
