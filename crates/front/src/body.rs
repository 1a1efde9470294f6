//! The body of a request: bounded in bytes and in time.

use std::error::Error;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use http::{HeaderMap, header};
use http_body_util::LengthLimitError;

/// How long a body may take to arrive: a client that sends a byte a minute must not hold a task for ever.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A body that did not arrive whole. Each front says in its own words what is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyError {
    TooLarge { limit: usize },
    Slow(Duration),
    Broken(String),
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// If it is larger, by its header or in truth, too slow, or broken off.
pub async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, BodyError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > limit as u64) {
        return Err(BodyError::TooLarge { limit });
    }
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, limit)).await {
        Err(_) => Err(BodyError::Slow(BODY_TIMEOUT)),
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if too_long(&error) => Err(BodyError::TooLarge { limit }),
        Ok(Err(error)) => Err(BodyError::Broken(error.to_string())),
    }
}

fn too_long(error: &axum::Error) -> bool {
    error.source().is_some_and(|source| source.is::<LengthLimitError>())
}
