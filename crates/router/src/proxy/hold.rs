//! The activator: while no replica is ready, requests wait here, bounded in number and time, and are counted in the
//! gauge that a scaler reads. A scaler that asked the replicas alone could never wake from zero.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::errors::RouterError;
use crate::metrics::RouterMetrics;
use crate::options::HoldOptions;
use crate::replicas::registry::{Chosen, Registry};

/// What a client that was held in vain is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// A breaker that half opens tells nobody; this is how late that is noticed.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

pub struct Hold {
    options: HoldOptions,
    held: AtomicUsize,
    metrics: Arc<RouterMetrics>,
}

impl Hold {
    pub fn new(options: HoldOptions, metrics: Arc<RouterMetrics>) -> Self {
        Self { options, held: AtomicUsize::new(0), metrics }
    }

    /// Waits until `choose` finds a replica. Dropping the future forgets the request at once.
    ///
    /// # Errors
    /// If too many wait already, or none was found in time.
    pub async fn until_chosen(
        &self,
        registry: &Registry,
        choose: impl Fn() -> Option<Chosen>,
    ) -> Result<Chosen, RouterError> {
        let _place = self.place()?;
        let began = Instant::now();
        // Subscribed before the first look, so that no change is missed between the two.
        let mut changes = registry.changes();
        let found = tokio::time::timeout(self.options.timeout, async {
            loop {
                if let Some(chosen) = choose() {
                    return chosen;
                }
                // The sender is the registry's, which outlives this.
                let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
            }
        });
        let found = found.await;
        self.metrics.held(began.elapsed());
        found.map_err(|_| RouterError::NoReplica { waited: self.options.timeout, retry_after: RETRY_AFTER })
    }

    fn place(&self) -> Result<Place<'_>, RouterError> {
        let limit = self.options.max_requests;
        if self.held.fetch_add(1, Ordering::AcqRel) >= limit {
            self.held.fetch_sub(1, Ordering::AcqRel);
            return Err(RouterError::TooManyHeld { limit, retry_after: RETRY_AFTER });
        }
        self.metrics.requests_held.inc();
        self.metrics.requests_waiting.inc();
        Ok(Place(self))
    }
}

struct Place<'a>(&'a Hold);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::AcqRel);
        self.0.metrics.requests_held.dec();
        self.0.metrics.requests_waiting.dec();
    }
}
