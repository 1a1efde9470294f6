//! OpenAI's error envelope.

use serde::{Deserialize, Serialize};

/// `{"error": {...}}`, the body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEnvelope {
    pub error: ErrorBody,
}

/// All four members are always present; `param` and `code` may be null.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub message: String,
    pub r#type: ErrorType,
    /// The field at fault, as a path, e.g. `messages[0].content`.
    pub param: Option<String>,
    /// A word that programs may branch on, e.g. `model_not_found`.
    pub code: Option<String>,
}

/// OpenAI's kinds of error. What retrying may cure is `rate_limit_error` and `server_error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorType {
    InvalidRequestError,
    AuthenticationError,
    NotFoundError,
    RateLimitError,
    ServerError,
}
