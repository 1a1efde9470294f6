//! Where prompts are tokenised: off the async threads, a bounded number at a time, and not longer than it is worth.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Semaphore;

use super::tokeniser::Tokeniser;
use crate::choice::fleet::Exact;
use crate::metrics::{RouterMetrics, Tokenising};

/// Larger bodies have a desk of their own, so that they make nobody wait but each other.
const LONG_BYTES: usize = 64 * 1024;

pub struct Desk {
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
    timeout: Duration,
    metrics: Arc<RouterMetrics>,
}

impl Desk {
    /// `timeout`: how long a request waits for its tokens at most; it goes on without them then.
    pub fn new(timeout: Duration, metrics: Arc<RouterMetrics>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (short, long) = (Semaphore::new(cores), Semaphore::new((cores / 2).max(1)));
        Self { short: Arc::new(short), long: Arc::new(long), timeout, metrics }
    }

    /// What each of the tokenisers makes of a body of `bytes` bytes; those that make nothing of it, or not in time,
    /// are left out.
    pub async fn exact(&self, body: Value, bytes: usize, tokenisers: Vec<Arc<Tokeniser>>) -> Vec<Exact> {
        if tokenisers.is_empty() {
            return Vec::new();
        }
        let began = Instant::now();
        let desk = if bytes > LONG_BYTES { &self.long } else { &self.short };
        let work = async {
            let permit = desk.clone().acquire_owned().await.ok()?;
            let work = move || {
                // Held to the end of the work, even if nobody waits for it any more.
                let _permit = permit;
                let exact = tokenisers.iter().map(|tokeniser| tokeniser.exact(body.clone()));
                exact.collect::<Vec<_>>()
            };
            tokio::task::spawn_blocking(work).await.ok()
        };
        let Ok(made) = tokio::time::timeout(self.timeout, work).await else {
            self.metrics.tokenised(Tokenising::Late);
            return Vec::new();
        };
        self.metrics.tokenise_seconds.observe(began.elapsed().as_secs_f64());
        let mut all = Vec::new();
        for exact in made.unwrap_or_default() {
            match exact {
                Ok(exact) => all.push(exact),
                // The replica will say so to the client, if it sees it as we do.
                Err(error) => tracing::debug!(%error, "a prompt was not tokenised"),
            }
        }
        self.metrics.tokenised(if all.is_empty() { Tokenising::Unreadable } else { Tokenising::Done });
        all
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::choice::policy::Policy;
    use crate::parity::tokeniser::tests::{TEMPLATE, files};

    fn desk(timeout: Duration) -> (Desk, Arc<RouterMetrics>) {
        let metrics = Arc::new(RouterMetrics::new("", Policy::Cost).unwrap());
        (Desk::new(timeout, metrics.clone()), metrics)
    }

    fn tokenisers() -> Vec<Arc<Tokeniser>> {
        vec![Arc::new(Tokeniser::new(&files(TEMPLATE)).unwrap())]
    }

    fn count(metrics: &RouterMetrics, outcome: &str) -> bool {
        metrics.encode().unwrap().contains(&format!("router_tokenised_total{{outcome=\"{outcome}\"}} 1\n"))
    }

    #[tokio::test]
    async fn a_prompt_is_tokenised_or_it_is_said_why_not() {
        let (desk, metrics) = desk(Duration::from_secs(600));
        let exact = desk.exact(json!({"prompt": "a block"}), 20, tokenisers()).await;
        assert_eq!((exact.len(), exact[0].tokens), (1, 3));
        assert_eq!(desk.exact(json!({"prompt": 7}), 20, tokenisers()).await, []);
        assert!(count(&metrics, "done") && count(&metrics, "unreadable"));
        assert_eq!(desk.exact(json!({"prompt": "a"}), 20, Vec::new()).await, [], "nobody wants tokens");
    }

    #[tokio::test]
    async fn long_prompts_make_only_each_other_wait() {
        let (desk, metrics) = desk(Duration::from_millis(100));
        let cores = desk.long.available_permits() as u32;
        let _busy = desk.long.clone().acquire_many_owned(cores).await.unwrap();
        let body = || json!({"prompt": "a block"});
        assert_eq!(desk.exact(body(), LONG_BYTES + 1, tokenisers()).await, [], "it goes on without tokens");
        assert!(count(&metrics, "late"));
        let (desk, _) = self::desk(Duration::from_secs(600));
        let _busy = desk.long.clone().acquire_many_owned(cores).await.unwrap();
        assert_eq!(desk.exact(body(), 20, tokenisers()).await.len(), 1);
    }
}
