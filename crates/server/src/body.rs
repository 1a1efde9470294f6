//! The body of a request: bounded, in time, and JSON.

use std::error::Error;
use std::time::Duration;

use axum::body::{Body, Bytes};
use http::{HeaderMap, header};
use http_body_util::LengthLimitError;
use serde_json::Value;

use crate::blocking::Blocking;
use crate::errors::ApiError;

/// How long a body may take to arrive: a client that sends a byte a minute must not hold a task for ever.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Larger bodies are parsed off the async threads.
const PARSE_INLINE_BYTES: usize = 64 * 1024;

/// Reads and parses a JSON body.
///
/// # Errors
/// If it is no JSON by its header or its content, too large, too slow, or broken off.
pub async fn json(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    blocking: &Blocking,
) -> Result<Value, ApiError> {
    check_content_type(headers)?;
    let bytes = bytes(headers, body, limit).await?;
    if bytes.len() <= PARSE_INLINE_BYTES { parse(&bytes) } else { blocking.run(move || parse(&bytes)).await }
}

/// serde_json stops at 128 levels of nesting, so that no body can exhaust the stack.
fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    if bytes.is_empty() {
        return Err(ApiError::Json("it is empty".into()));
    }
    serde_json::from_slice(bytes).map_err(|error| ApiError::Json(error.to_string()))
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or("not readable"));
    let essence = given.and_then(|given| given.split(';').next()).unwrap_or("").trim().to_ascii_lowercase();
    let json =
        essence == "application/json" || essence.starts_with("application/") && essence.ends_with("+json");
    if json {
        return Ok(());
    }
    let given = given.map_or_else(|| "missing".to_owned(), |given| given.chars().take(100).collect());
    Err(ApiError::ContentType { given })
}

async fn bytes(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > limit as u64) {
        return Err(ApiError::TooLarge { limit });
    }
    let read = axum::body::to_bytes(body, limit);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Err(_) => Err(ApiError::BodySlow(BODY_TIMEOUT)),
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if too_long(&error) => Err(ApiError::TooLarge { limit }),
        Ok(Err(error)) => Err(ApiError::BodyBroken(error.to_string())),
    }
}

fn too_long(error: &axum::Error) -> bool {
    error.source().is_some_and(|source| source.is::<LengthLimitError>())
}
