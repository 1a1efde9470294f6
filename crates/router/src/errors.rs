//! Why the router itself refuses a request, in OpenAI's shape. What replicas answer passes unchanged.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use servelab_front::{BodyError, KeyError};
use servelab_wire::{ErrorBody, ErrorEnvelope, ErrorType};

use crate::limits::{Denied, Kind, Refused};

#[derive(Clone, Debug, thiserror::Error)]
pub enum RouterError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("replicas are changed with the admin key only; send it as \"Authorization: Bearer KEY\"")]
    NotAdmin,
    #[error("this router was started without an admin key, so that nobody can change its replicas over HTTP")]
    NoAdmin,
    #[error("the body exceeds {limit} bytes; shorten it, or start the router with a larger limit")]
    TooLarge { limit: usize },
    #[error("the body did not arrive: {0}")]
    BodyBroken(String),
    #[error("the body did not arrive within {} s", .0.as_secs())]
    BodySlow(Duration),
    #[error("{0}")]
    BadRequest(String),
    #[error(
        "{limit} connections are open, which is the limit; close idle ones, or start the router with a larger \
         --max-connections"
    )]
    TooManyConnections { limit: usize },
    #[error("no replica was ready within {} s; try again in {} s", .waited.as_secs(), .retry_after.as_secs())]
    NoReplica { waited: Duration, retry_after: Duration },
    #[error("no replica is ready and {limit} requests wait for one already, which is the limit; try again in {} s", .retry_after.as_secs())]
    TooManyHeld { limit: usize, retry_after: Duration },
    #[error("{limit} requests wait already, which is the limit; try again in {} s", .retry_after.as_secs())]
    QueueFull { limit: usize, retry_after: Duration },
    #[error("{0}")]
    Limit(Refused),
    #[error("the limits cannot be checked now, and no request goes on without; try again in 1 s")]
    LimitsAway,
    #[error("the replica could not be reached; send the request again")]
    Unreachable,
    #[error("the replica broke off before it answered; send the request again")]
    BrokenOff,
    #[error("the replica broke off in the middle of the answer; send the request again")]
    Cut,
    #[error("the replica did not begin to answer within {} s", .0.as_secs())]
    FirstByte(Duration),
    #[error("the replica answers nothing any more, not even whether it is well; send the request again")]
    Lost,
    #[error("the replica said nothing for {} s in the middle of the answer", .0.as_secs())]
    Idle(Duration),
    #[error("the answer was not complete after {} s, which is the limit", .0.as_secs())]
    Total(Duration),
    #[error("the router is shutting down; send the request to another one")]
    Draining,
    #[error("the router shut down before the answer was complete; send the request again")]
    Drained,
    #[error("the Idempotency-Key was used for another request; use a new key, or send that request again")]
    OtherBody,
    #[error("an Idempotency-Key is 1 to {0} visible ASCII characters")]
    BadIdempotencyKey(usize),
    #[error(
        "the request with this Idempotency-Key still runs and as many wait for it as may; try again in 1 s"
    )]
    StillRunning,
    /// A fault of this program; the text goes to the log.
    #[error("the router failed; the log has the details under this request's x-request-id")]
    Internal(String),
}

impl From<BodyError> for RouterError {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::TooLarge { limit } => Self::TooLarge { limit },
            BodyError::Slow(limit) => Self::BodySlow(limit),
            BodyError::Broken(how) => Self::BodyBroken(how),
        }
    }
}

impl From<Denied> for RouterError {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Limit(refused) => Self::Limit(refused),
            Denied::Away => Self::LimitsAway,
        }
    }
}

impl RouterError {
    pub fn status(&self) -> StatusCode {
        self.shape().0
    }

    /// A word for programs.
    pub fn code(&self) -> Option<&'static str> {
        self.shape().2
    }

    /// The body of the answer, or of the event that ends a stream.
    pub fn envelope(&self) -> ErrorEnvelope {
        let (_, kind, code) = self.shape();
        let body =
            ErrorBody { message: self.to_string(), r#type: kind, param: None, code: code.map(str::to_owned) };
        ErrorEnvelope { error: body }
    }

    /// The event that ends a stream whose answer is not whole.
    pub fn event(&self) -> Bytes {
        servelab_wire::sse::frame(&self.envelope()).unwrap_or_default().into()
    }

    fn shape(&self) -> (StatusCode, ErrorType, Option<&'static str>) {
        use ErrorType::{AuthenticationError, InvalidRequestError, RateLimitError, ServerError};
        match self {
            Self::Key(_) => (StatusCode::UNAUTHORIZED, AuthenticationError, Some("invalid_api_key")),
            Self::NotAdmin => (StatusCode::UNAUTHORIZED, AuthenticationError, Some("invalid_admin_key")),
            Self::NoAdmin => (StatusCode::FORBIDDEN, AuthenticationError, Some("no_admin_key")),
            Self::TooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, InvalidRequestError, Some("body_too_large"))
            }
            Self::BodyBroken(_) | Self::BadRequest(_) | Self::BadIdempotencyKey(_) => {
                (StatusCode::BAD_REQUEST, InvalidRequestError, None)
            }
            Self::BodySlow(_) => (StatusCode::REQUEST_TIMEOUT, InvalidRequestError, None),
            Self::TooManyConnections { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("too_many_connections"))
            }
            Self::NoReplica { .. } | Self::TooManyHeld { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("no_replica"))
            }
            Self::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, RateLimitError, Some("queue_full")),
            Self::Limit(refused) => {
                let code = match refused.kind {
                    Kind::Requests => "requests",
                    Kind::Tokens => "tokens",
                };
                (StatusCode::TOO_MANY_REQUESTS, RateLimitError, Some(code))
            }
            Self::LimitsAway => (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("limits_unavailable")),
            Self::Unreachable | Self::BrokenOff | Self::Cut => {
                (StatusCode::BAD_GATEWAY, ServerError, Some("replica_failed"))
            }
            Self::FirstByte(_) | Self::Lost | Self::Idle(_) | Self::Total(_) => {
                (StatusCode::GATEWAY_TIMEOUT, ServerError, Some("replica_timed_out"))
            }
            Self::Draining | Self::Drained => {
                (StatusCode::SERVICE_UNAVAILABLE, ServerError, Some("shutting_down"))
            }
            Self::OtherBody => {
                (StatusCode::UNPROCESSABLE_ENTITY, InvalidRequestError, Some("idempotency_key_reused"))
            }
            Self::StillRunning => (StatusCode::CONFLICT, InvalidRequestError, Some("still_running")),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, ServerError, None),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NoReplica { retry_after, .. }
            | Self::TooManyHeld { retry_after, .. }
            | Self::QueueFull { retry_after, .. } => Some(*retry_after),
            Self::Limit(refused) => refused.retry_after,
            Self::LimitsAway | Self::Draining | Self::Drained | Self::StillRunning => {
                Some(Duration::from_secs(1))
            }
            _ => None,
        }
    }
}

impl IntoResponse for RouterError {
    fn into_response(self) -> Response {
        if let Self::Internal(detail) = &self {
            tracing::error!(detail, "request failed");
        }
        let mut response = (self.status(), axum::Json(self.envelope())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after() {
            // Whole seconds, and never too early.
            headers
                .insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs_f64().ceil().max(1.0) as u64));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, Self::Draining | Self::Drained) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
