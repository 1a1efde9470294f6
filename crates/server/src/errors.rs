//! The one place that turns a fault into HTTP: status, OpenAI's error envelope, headers.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use servelab_engine::AdmissionError;
use servelab_front::prompts::PromptError;
use servelab_front::{BodyError, KeyError};
use servelab_text::TextError;
use servelab_wire::{ErrorBody, ErrorEnvelope, ErrorType, FieldError};

/// Why a request got no answer, or no whole one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("the body is not valid JSON: {0}")]
    Json(String),
    #[error("the content type is {given}; send the body as application/json")]
    ContentType { given: String },
    #[error("the body exceeds {limit} bytes; shorten it, or start the server with a larger limit")]
    TooLarge { limit: usize },
    #[error("the body did not arrive: {0}")]
    BodyBroken(String),
    #[error("the body did not arrive within {} s", .0.as_secs())]
    BodySlow(Duration),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the model {model:?} does not exist; this server serves {served}")]
    NoSuchModel { model: String, served: String },
    #[error("there is nothing at {path}")]
    NoSuchRoute { path: String },
    #[error("{method} is not allowed at {path}; {advice}")]
    WrongMethod { method: String, path: String, advice: &'static str },
    #[error(transparent)]
    Admission(AdmissionError),
    #[error("{live} requests are running or waiting, which is the limit; try again in {} s", .retry_after.as_secs())]
    QueueFull { live: usize, retry_after: Duration },
    #[error(
        "the request needs {places} places in the queue and there are {limit}; send fewer prompts at once"
    )]
    TooManyPrompts { places: usize, limit: usize },
    #[error(
        "{limit} connections are open, which is the limit; close idle ones, or start the server with a larger \
         --max-connections"
    )]
    TooManyConnections { limit: usize },
    #[error("the model is still loading; try again in {} s", .0.as_secs())]
    Loading(Duration),
    #[error("the server is shutting down; send the request to another replica")]
    Draining,
    #[error("the server shut down before the answer was complete; send the request again")]
    Drained,
    #[error("the model failed and the server is going down; send the request to another replica")]
    Down,
    #[error("{0}")]
    Text(TextError),
    #[error("this model has no chat template, so that it cannot chat; use /v1/completions")]
    NoChatTemplate,
    /// The text is the runner's and goes to the log; clients see that the model failed.
    #[error("the model failed while it computed the answer; send the request again")]
    Model(String),
    /// A fault of this program; the text goes to the log.
    #[error("the server failed; the log has the details under this request's x-request-id")]
    Internal(String),
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        Self::Text(error)
    }
}

impl From<PromptError> for ApiError {
    fn from(error: PromptError) -> Self {
        match error {
            PromptError::NoChatTemplate => Self::NoChatTemplate,
            PromptError::Text(error) => Self::Text(error),
            PromptError::Messages(how) => Self::Internal(how),
        }
    }
}

/// What the envelope says besides the message.
struct Shape {
    status: StatusCode,
    kind: ErrorType,
    code: Option<&'static str>,
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::TooLarge { limit } => Self::TooLarge { limit },
            BodyError::Slow(limit) => Self::BodySlow(limit),
            BodyError::Broken(how) => Self::BodyBroken(how),
        }
    }
}

impl ApiError {
    /// What went wrong in words that only the log should have.
    pub fn log_detail(&self) -> Option<&str> {
        match self {
            Self::Model(detail) | Self::Internal(detail) => Some(detail),
            _ => None,
        }
    }

    pub fn status(&self) -> StatusCode {
        self.shape().status
    }

    /// A word for programs.
    pub fn code(&self) -> Option<&'static str> {
        self.shape().code
    }

    /// The body of the answer, or of the event that ends a stream.
    pub fn envelope(&self) -> ErrorEnvelope {
        let Shape { kind, code, .. } = self.shape();
        let code = code.map(str::to_owned);
        ErrorEnvelope {
            error: ErrorBody { message: self.to_string(), r#type: kind, param: self.param(), code },
        }
    }

    fn shape(&self) -> Shape {
        use ErrorType::{
            AuthenticationError, InvalidRequestError, NotFoundError, RateLimitError, ServerError,
        };
        let (status, kind, code) = match self {
            Self::Field(_) | Self::BodyBroken(_) | Self::TooManyPrompts { .. } | Self::NoChatTemplate => {
                (StatusCode::BAD_REQUEST, InvalidRequestError, None)
            }
            Self::Json(_) => (StatusCode::BAD_REQUEST, InvalidRequestError, Some("invalid_json")),
            Self::BodySlow(_) => (StatusCode::REQUEST_TIMEOUT, InvalidRequestError, None),
            Self::ContentType { .. } => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, InvalidRequestError, Some("unsupported_content_type"))
            }
            Self::TooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, InvalidRequestError, Some("body_too_large"))
            }
            Self::Key(_) => (StatusCode::UNAUTHORIZED, AuthenticationError, Some("invalid_api_key")),
            Self::NoSuchModel { .. } => (StatusCode::NOT_FOUND, InvalidRequestError, Some("model_not_found")),
            Self::NoSuchRoute { .. } => (StatusCode::NOT_FOUND, NotFoundError, Some("not_found")),
            Self::WrongMethod { .. } => {
                (StatusCode::METHOD_NOT_ALLOWED, InvalidRequestError, Some("method_not_allowed"))
            }
            Self::Admission(AdmissionError::ContextLength { .. }) => {
                (StatusCode::BAD_REQUEST, InvalidRequestError, Some("context_length_exceeded"))
            }
            Self::QueueFull { .. } | Self::Admission(AdmissionError::QueueFull { .. }) => {
                (StatusCode::TOO_MANY_REQUESTS, RateLimitError, Some("queue_full"))
            }
            Self::Admission(AdmissionError::DuplicateId(_)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, ServerError, None)
            }
            Self::Admission(_) => (StatusCode::BAD_REQUEST, InvalidRequestError, None),
            Self::TooManyConnections { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("too_many_connections"))
            }
            Self::Loading(_) => (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("model_loading")),
            Self::Draining | Self::Drained => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("shutting_down"))
            }
            Self::Down => (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("model_failed")),
            Self::Text(error) if error.is_request_fault() => {
                (StatusCode::BAD_REQUEST, InvalidRequestError, None)
            }
            Self::Model(_) => (StatusCode::INTERNAL_SERVER_ERROR, ServerError, Some("model_failed")),
            Self::Text(_) | Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, ServerError, None),
        };
        Shape { status, kind, code }
    }

    fn param(&self) -> Option<String> {
        match self {
            Self::Field(error) if !error.param.is_empty() => Some(error.param.clone()),
            Self::NoSuchModel { .. } => Some("model".into()),
            Self::TooManyPrompts { .. } => Some("prompt".into()),
            Self::Admission(AdmissionError::TooManyChoices { .. }) => Some("n".into()),
            Self::Admission(AdmissionError::ContextLength { .. } | AdmissionError::NeverFits { .. }) => {
                Some("max_tokens".into())
            }
            Self::Admission(AdmissionError::EmptyPrompt) => Some("prompt".into()),
            _ => None,
        }
    }

    /// When a retry may be worth while.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after, .. } | Self::Loading(retry_after) => Some(*retry_after),
            Self::Admission(AdmissionError::QueueFull { .. }) | Self::Draining | Self::Drained => {
                Some(Duration::from_secs(1))
            }
            _ => None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Some(detail) = self.log_detail() {
            tracing::error!(detail, "request failed");
        }
        let mut response = (self.status(), axum::Json(self.envelope())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, Self::Draining | Self::Drained | Self::Down) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
