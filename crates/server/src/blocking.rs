//! Work that takes milliseconds or more, off the async threads and a bounded number at a time.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::errors::ApiError;

/// Runs work on tokio's blocking threads, as many at once as there are cores.
#[derive(Clone)]
pub struct Blocking {
    permits: Arc<Semaphore>,
}

impl Blocking {
    pub fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { permits: Arc::new(Semaphore::new(cores)) }
    }

    /// Waits for a free core and runs `work` to its end, even if the caller goes away meanwhile.
    ///
    /// # Errors
    /// That of `work`, or [`ApiError::Internal`] if it panicked.
    pub async fn run<T, F>(&self, work: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        let internal = |error: &dyn std::fmt::Display| ApiError::Internal(error.to_string());
        let permit = self.permits.clone().acquire_owned().await.map_err(|error| internal(&error))?;
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        task.await.map_err(|error| internal(&error))?
    }
}
