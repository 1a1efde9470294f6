//! The body of a request: bounded, in time, and JSON.

use axum::body::Body;
use http::{HeaderMap, header};
use serde_json::Value;
use servelab_front::body::read;

use crate::blocking::Blocking;
use crate::errors::ApiError;

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
    let bytes = read(headers, body, limit).await?;
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
