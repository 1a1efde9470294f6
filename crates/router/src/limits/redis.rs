//! Limits that several routers share: the buckets stand in Redis, and one script decides about a request, all at once.
//!
//! Redis may be slow or away. A request waits for it no longer than its time-out, and only the first few that notice do:
//! from then on [`Away`] says what happens, until Redis has answered in time again. What a router could not settle
//! meanwhile stays taken, and flows back within a minute as everything does.

use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisError, Script};
use ring::digest;
use servelab_telemetry::Secret;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::bucket::Level;
use super::{KeyLimits, Levels, Refused};
use crate::metrics::RouterMetrics;

/// See the file.
pub const SCRIPT: &str = include_str!("bucket.lua");
/// In front of the keys' names.
const PREFIX: &str = "servelab:limits:";
/// How long a connection may take to be made, beside the requests.
const CONNECT: Duration = Duration::from_secs(2);
/// How often Redis is asked whether it is back.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// What was used and Redis does not know yet: at most as many, and sent so many at once.
const MAX_UNSETTLED: usize = 4096;
const SETTLE_AT_ONCE: usize = 32;
/// How long the last of it may take when the router goes down.
const LAST: Duration = Duration::from_secs(1);

/// What happens to requests while Redis does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Away {
    /// Each router counts for itself, so that a key has its limit at each of them.
    #[default]
    Local,
    /// They are refused: the limit holds, whatever that costs.
    Refuse,
    /// They go on uncounted.
    Allow,
}

/// A word that is none of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of local, refuse, allow")]
pub struct UnknownAway(String);

impl FromStr for Away {
    type Err = UnknownAway;

    fn from_str(text: &str) -> Result<Self, UnknownAway> {
        match text {
            "local" => Ok(Self::Local),
            "refuse" => Ok(Self::Refuse),
            "allow" => Ok(Self::Allow),
            other => Err(UnknownAway(other.to_owned())),
        }
    }
}

/// Where Redis is. Shown without user and password.
#[derive(Clone)]
pub struct RedisAddress(Client);

/// The text may hold a password, so that it is not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it is no address of Redis; give it as redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], or with rediss:// for TLS"
)]
pub struct BadRedisAddress;

impl FromStr for RedisAddress {
    type Err = BadRedisAddress;

    fn from_str(text: &str) -> Result<Self, BadRedisAddress> {
        if !["redis://", "rediss://"].iter().any(|scheme| text.starts_with(scheme)) {
            return Err(BadRedisAddress);
        }
        Client::open(text).map(Self).map_err(|_| BadRedisAddress)
    }
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.get_connection_info().addr().fmt(formatter)
    }
}

impl fmt::Debug for RedisAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[derive(Clone, Debug)]
pub struct RedisOptions {
    pub address: RedisAddress,
    /// How long a request may wait for it.
    pub timeout: Duration,
    pub away: Away,
}

/// Why there is no decision.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("it does not answer within {} ms", .0.as_millis())]
    Slow(Duration),
    #[error(transparent)]
    Redis(#[from] RedisError),
}

/// The limits in Redis.
#[derive(Debug)]
pub struct Shared {
    inner: Arc<Inner>,
    unsettled: mpsc::Sender<Unsettled>,
    settling: TaskTracker,
    tasks: [JoinHandle<()>; 2],
}

struct Inner {
    options: RedisOptions,
    connection: ConnectionManager,
    script: Script,
    metrics: Arc<RouterMetrics>,
    is_away: AtomicBool,
    failed: Notify,
}

impl fmt::Debug for Inner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Inner").field("options", &self.options).finish_non_exhaustive()
    }
}

/// What the script is asked.
#[derive(Clone, Debug)]
struct Question {
    key: String,
    limits: KeyLimits,
    requests: u64,
    tokens: i64,
    settles: bool,
}

struct Unsettled {
    question: Question,
    _counted: TaskTrackerToken,
}

impl Shared {
    /// Connects beside the requests, now and whenever the connection is lost. Needs the runtime.
    ///
    /// # Errors
    /// If the address cannot be used.
    pub fn new(options: RedisOptions, metrics: Arc<RouterMetrics>) -> Result<Self, RedisError> {
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(Some(CONNECT))
            .set_number_of_retries(1);
        let connection = ConnectionManager::new_lazy_with_config(options.address.0.clone(), config)?;
        let script = Script::new(SCRIPT);
        let (is_away, failed) = (AtomicBool::new(false), Notify::new());
        let inner = Arc::new(Inner { options, connection, script, metrics, is_away, failed });
        let (unsettled, waiting) = mpsc::channel(MAX_UNSETTLED);
        let tasks = [tokio::spawn(settle_all(inner.clone(), waiting)), tokio::spawn(watch(inner.clone()))];
        Ok(Self { inner, unsettled, settling: TaskTracker::new(), tasks })
    }

    pub fn away(&self) -> Away {
        self.inner.options.away
    }

    /// Takes one request and `tokens` tokens, both or neither. `None` if Redis does not tell.
    pub(super) async fn take(
        &self,
        name: &str,
        limits: &KeyLimits,
        tokens: u64,
    ) -> Option<Result<Levels, Refused>> {
        let Inner { options, metrics, .. } = &*self.inner;
        if self.inner.is_away.load(Ordering::Acquire) {
            metrics.limits_redis_away.inc();
            return None;
        }
        let question = Question {
            key: key(name),
            limits: *limits,
            requests: 1,
            tokens: i64::try_from(tokens).unwrap_or(i64::MAX),
            settles: false,
        };
        let began = Instant::now();
        let answer = self.inner.ask_within(options.timeout, &question).await;
        metrics.limits_redis_seconds.observe(began.elapsed().as_secs_f64());
        match answer {
            Ok((true, levels)) => Some(Ok(levels)),
            // By the same arithmetic as the script's, on the levels that it saw.
            Ok((false, levels)) => levels.refusal(tokens).map(Err),
            Err(failure) => {
                self.inner.lost(&failure);
                metrics.limits_redis_away.inc();
                None
            }
        }
    }

    /// Tells Redis, in time, what was used of what was taken.
    pub(super) fn settle(&self, name: &str, limits: &KeyLimits, taken: u64, used: u64) {
        let owed = i128::from(used) - i128::from(taken);
        let tokens = i64::try_from(owed).unwrap_or(i64::MAX);
        if tokens == 0 || limits.tokens_per_minute.is_none() {
            return;
        }
        let question = Question { key: key(name), limits: *limits, requests: 0, tokens, settles: true };
        let unsettled = Unsettled { question, _counted: self.settling.token() };
        if self.unsettled.try_send(unsettled).is_err() {
            self.inner.metrics.limits_redis_unsettled.inc();
        }
    }

    /// Waits, not for long, until Redis knows of all that was used.
    pub(super) async fn settled(&self) {
        self.settling.close();
        let _ = tokio::time::timeout(LAST, self.settling.wait()).await;
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Inner {
    /// Whether it was taken, and what each bucket has.
    async fn ask(&self, question: &Question) -> Result<(bool, Levels), RedisError> {
        let KeyLimits { requests_per_minute, tokens_per_minute } = question.limits;
        let mut invocation = self.script.prepare_invoke();
        invocation
            .key(question.key.as_str())
            .arg(requests_per_minute.unwrap_or(0))
            .arg(tokens_per_minute.unwrap_or(0))
            .arg(question.requests)
            .arg(question.tokens)
            .arg(if question.settles { "settle" } else { "take" });
        let (short, requests, tokens): (u8, f64, f64) =
            invocation.invoke_async(&mut self.connection.clone()).await?;
        let level = |limit: Option<u64>, left| limit.map(|limit| Level { per_minute: limit as f64, left });
        let levels = Levels {
            requests: level(requests_per_minute, requests),
            tokens: level(tokens_per_minute, tokens),
        };
        Ok((short == 0, levels))
    }

    async fn ask_within(&self, time: Duration, question: &Question) -> Result<(bool, Levels), Failure> {
        Ok(within(time, self.ask(question)).await??)
    }

    fn lost(&self, failure: &Failure) {
        if !self.is_away.swap(true, Ordering::AcqRel) {
            let Inner { options: RedisOptions { address, away, .. }, .. } = self;
            tracing::warn!(%address, %failure, ?away, "Redis is away; limits hold as --limits-redis-away says");
            self.failed.notify_one();
        }
    }
}

async fn within<T>(time: Duration, asked: impl Future<Output = T>) -> Result<T, Failure> {
    tokio::time::timeout(time, asked).await.map_err(|_| Failure::Slow(time))
}

/// The name of an API key there, from which nobody can tell the key.
pub fn name_of(secret: &Secret) -> String {
    let digest = digest::digest(&digest::SHA256, secret.expose().as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// Sends what was used. What cannot be sent now is counted and forgotten: Redis has it as taken.
async fn settle_all(inner: Arc<Inner>, waiting: mpsc::Receiver<Unsettled>) {
    ReceiverStream::new(waiting)
        .for_each_concurrent(SETTLE_AT_ONCE, async |unsettled| {
            let is_away = inner.is_away.load(Ordering::Acquire);
            let told = if is_away {
                false
            } else {
                let told = inner.ask_within(CONNECT, &unsettled.question).await;
                told.inspect_err(|failure| inner.lost(failure)).is_ok()
            };
            if !told {
                inner.metrics.limits_redis_unsettled.inc();
            }
        })
        .await;
}

/// Notices that Redis is there at all, before the first request does, and that it is back.
async fn watch(inner: Arc<Inner>) {
    loop {
        match is_well(&inner).await {
            Ok(()) => {
                if inner.is_away.swap(false, Ordering::AcqRel) {
                    tracing::info!(address = %inner.options.address, "Redis is back; limits are shared again");
                }
                inner.failed.notified().await;
            }
            Err(failure) => inner.lost(&failure),
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Asks what requests ask, and has it write too: a Redis that is full or only a copy is of no use. Once with time to
/// connect, and once as quickly as requests need it.
async fn is_well(inner: &Inner) -> Result<(), Failure> {
    let limits = KeyLimits { requests_per_minute: Some(1), tokens_per_minute: None };
    let question = Question { key: key("probe"), limits, requests: 0, tokens: 0, settles: true };
    inner.ask_within(CONNECT, &question).await?;
    inner.ask_within(inner.options.timeout, &question).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_its_password() {
        let address: RedisAddress = "redis://me:secret@redis.svc:6380/2".parse().unwrap();
        assert_eq!(
            (address.to_string(), format!("{address:?}")),
            ("redis.svc:6380".into(), "redis.svc:6380".into())
        );
        let options = RedisOptions { address, timeout: CONNECT, away: Away::Local };
        assert!(!format!("{options:?}").contains("secret"));
        assert!("rediss://redis.svc".parse::<RedisAddress>().is_ok());
        for wrong in ["", "redis.svc:6379", "http://redis.svc", "redis://", "redis://:secret@redis.svc/many"]
        {
            let error = wrong.parse::<RedisAddress>().unwrap_err().to_string();
            assert!(error.contains("redis://[[USER]:PASSWORD@]HOST") && !error.contains("secret"), "{error}");
        }
    }
}
