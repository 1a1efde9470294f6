//! What one API key may use: requests a minute and tokens a minute.
//!
//! At the door a request reserves its prompt, by the router's estimate, and all that it may generate; when its answer
//! tells what was used, the rest is given back. Counted in this process, each router counts for itself: with several of
//! them a key has the limit at each. Counted in Redis, they share it.

pub mod bucket;
pub mod queue;
pub mod redis;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use self::bucket::{Bucket, Level};
use self::redis::{Away, Shared};

/// What one key may use; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub requests_per_minute: Option<u64>,
    pub tokens_per_minute: Option<u64>,
}

impl KeyLimits {
    fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
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

/// Why a request may not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    Limit(Refused),
    /// Redis does not answer, and nobody may go on without it.
    Away,
}

impl Denied {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Limit(refused) => refused.kind.name(),
            Self::Away => "away",
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

/// What is left of a key's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Levels {
    requests: Option<Level>,
    tokens: Option<Level>,
}

impl Levels {
    fn both(&self) -> [(Kind, Option<Level>); 2] {
        [(Kind::Requests, self.requests), (Kind::Tokens, self.tokens)]
    }

    /// Why one request of `tokens` tokens may not go on, if it may not.
    fn refusal(&self, tokens: u64) -> Option<Refused> {
        self.both().into_iter().zip([1, tokens]).find_map(|((kind, level), wanted)| {
            let level = level?;
            let retry_after = level.wait(wanted);
            let limit = level.per_minute as u64;
            let is_there = retry_after.is_some_and(|wait| wait.is_zero());
            (!is_there).then_some(Refused { kind, limit, wanted, retry_after })
        })
    }

    /// OpenAI's `x-ratelimit-*` headers.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        for (kind, level) in self.both() {
            let Some(level) = level else { continue };
            let values = [
                ("limit", level.per_minute.to_string()),
                ("remaining", level.remaining().to_string()),
                ("reset", format!("{:.3}s", level.reset().as_secs_f64())),
            ];
            for (what, value) in values {
                let name = HeaderName::try_from(format!("x-ratelimit-{what}-{}", kind.name()));
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

/// The buckets of one key, in this process.
#[derive(Debug)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Buckets {
    fn new(limits: &KeyLimits, now: Duration) -> Self {
        let bucket = |limit: Option<u64>| limit.map(|limit| Bucket::new(limit, now));
        Self { requests: bucket(limits.requests_per_minute), tokens: bucket(limits.tokens_per_minute) }
    }

    fn levels(&mut self, now: Duration) -> Levels {
        let level = |bucket: &mut Option<Bucket>| bucket.as_mut().map(|bucket| bucket.level(now));
        Levels { requests: level(&mut self.requests), tokens: level(&mut self.tokens) }
    }

    /// Takes one request and `tokens` tokens, both or neither. What is left then.
    fn take(&mut self, now: Duration, tokens: u64) -> Result<Levels, Refused> {
        if let Some(refused) = self.levels(now).refusal(tokens) {
            return Err(refused);
        }
        for (bucket, wanted) in [(&mut self.requests, 1), (&mut self.tokens, tokens)] {
            if let Some(bucket) = bucket {
                bucket.take(now, wanted);
            }
        }
        Ok(self.levels(now))
    }

    /// As many tokens were used of those that were taken.
    fn settle(&mut self, now: Duration, taken: u64, used: u64) {
        let Some(bucket) = &mut self.tokens else { return };
        if used <= taken {
            bucket.give_back(taken - used);
        } else {
            bucket.take(now, used - taken);
        }
    }
}

#[derive(Debug)]
struct Key {
    limits: KeyLimits,
    /// The same in every router that knows the key, and nothing that the key could be read from.
    name: String,
    buckets: Mutex<Buckets>,
}

/// What every key has left.
#[derive(Debug)]
pub struct Limits {
    keys: Vec<Key>,
    shared: Option<Shared>,
}

/// Where a reservation was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    Redis,
    Nowhere,
}

impl Limits {
    /// One entry a key, its name and what it may use; without keys one for everybody.
    pub fn new(keys: Vec<(String, KeyLimits)>, shared: Option<Shared>, now: Duration) -> Self {
        let key = |(name, limits): (String, KeyLimits)| Key {
            limits,
            name,
            buckets: Mutex::new(Buckets::new(&limits, now)),
        };
        Self { keys: keys.into_iter().map(key).collect(), shared }
    }

    /// Takes one request and `tokens` tokens, both or neither. Waits no longer than Redis may take.
    ///
    /// # Errors
    /// If a limit would be exceeded.
    pub async fn reserve(
        self: &Arc<Self>,
        key: usize,
        now: Duration,
        tokens: u64,
    ) -> Result<Reservation, Denied> {
        let reservation = |place, levels| Reservation { limits: self.clone(), key, tokens, place, levels };
        let Key { limits, name, buckets } = &self.keys[key];
        if limits.is_unlimited() {
            return Ok(reservation(Place::Nowhere, Levels::default()));
        }
        if let Some(shared) = &self.shared {
            match shared.take(name, limits, tokens).await {
                Some(Ok(levels)) => return Ok(reservation(Place::Redis, levels)),
                Some(Err(refused)) => return Err(Denied::Limit(refused)),
                None => match shared.away() {
                    Away::Local => {}
                    Away::Refuse => return Err(Denied::Away),
                    Away::Allow => return Ok(reservation(Place::Nowhere, Levels::default())),
                },
            }
        }
        let levels = lock(buckets).take(now, tokens).map_err(Denied::Limit)?;
        Ok(reservation(Place::Here, levels))
    }

    /// Waits until Redis knows what was used, for a moment.
    pub async fn settled(&self) {
        if let Some(shared) = &self.shared {
            shared.settled().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a request took at the door. Dropped unsettled it keeps all of it: the request may have been computed.
#[derive(Debug)]
pub struct Reservation {
    limits: Arc<Limits>,
    key: usize,
    tokens: u64,
    place: Place,
    levels: Levels,
}

impl Reservation {
    /// What it left.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// The request used that many tokens: gives the rest back, or takes what is missing, where it was taken.
    pub fn settle(self, now: Duration, used: u64) {
        let key = &self.limits.keys[self.key];
        match (self.place, &self.limits.shared) {
            (Place::Here, _) => lock(&key.buckets).settle(now, self.tokens, used),
            (Place::Redis, Some(shared)) => shared.settle(&key.name, &key.limits, self.tokens, used),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    async fn refused(limits: &Arc<Limits>, tokens: u64) -> Refused {
        match limits.reserve(0, NOW, tokens).await {
            Err(Denied::Limit(refused)) => refused,
            other => panic!("{other:?}"),
        }
    }

    fn limits(requests: Option<u64>, tokens: Option<u64>) -> Arc<Limits> {
        let key = KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens };
        Arc::new(Limits::new(vec![("one".into(), key), ("other".into(), key)], None, NOW))
    }

    #[tokio::test]
    async fn a_refused_request_takes_nothing_and_keys_do_not_share() {
        let limits = limits(Some(2), Some(100));
        let told = refused(&limits, 101).await;
        assert_eq!((told.kind, told.retry_after), (Kind::Tokens, None));
        limits.reserve(0, NOW, 60).await.unwrap();
        let told = refused(&limits, 60).await;
        assert_eq!(told.retry_after, Some(Duration::from_secs(12)));
        limits.reserve(0, NOW, 40).await.unwrap();
        let told = refused(&limits, 0).await;
        assert_eq!(told.to_string(), "the limit of 2 requests a minute is reached; try again in 30 s");
        limits.reserve(1, NOW, 100).await.unwrap();
    }

    #[tokio::test]
    async fn what_was_not_used_comes_back_and_what_was_used_beyond_is_owed() {
        let limits = limits(None, Some(100));
        limits.reserve(0, NOW, 90).await.unwrap().settle(NOW, 20);
        limits.reserve(0, NOW, 80).await.unwrap().settle(NOW, 130);
        let told = refused(&limits, 10).await;
        assert_eq!(told.retry_after, Some(Duration::from_secs(36)), "50 are owed, 10 are wanted");
    }

    #[tokio::test]
    async fn headers_are_openais() {
        let limits = limits(Some(60), Some(6000));
        let mut headers = HeaderMap::new();
        limits.reserve(0, NOW, 1000).await.unwrap().levels().write_headers(&mut headers);
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
