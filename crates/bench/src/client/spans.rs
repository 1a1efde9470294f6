//! The client's span of a request, for whoever wants to see one trace from here to the model.

use std::time::Duration;

use servelab_telemetry::traces::{KeyValue, SpanKind, strings};
use servelab_telemetry::{RequestTrace, Traces};

use super::{Failure, Observed, Target};
use crate::result::Endpoint;

pub fn begin(traces: &Traces, target: &Target, endpoint: Endpoint) -> RequestTrace {
    let trace = traces.begin(|| format!("POST {}", endpoint.path()), SpanKind::Client);
    if trace.is_recorded() {
        let operation = match endpoint {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "text_completion",
        };
        trace.set([
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("http.request.method", "POST"),
            KeyValue::new("server.address", target.host().to_owned()),
            KeyValue::new("server.port", i64::from(target.port())),
        ]);
    }
    trace
}

/// What was seen of a request that has ended.
pub fn tell(trace: &RequestTrace, observed: &Observed, outcome: &Result<(), Failure>) {
    let Some(sent) = observed.sent.filter(|_| trace.is_recorded()) else { return };
    let since = |at: Duration| at.saturating_sub(sent);
    trace
        .set([KeyValue::new("servelab.late_seconds", sent.saturating_sub(observed.scheduled).as_secs_f64())]);
    for (name, at) in [("first_byte", observed.first_byte), ("first_token", observed.first_token)] {
        if let Some(at) = at {
            trace.event(since(at), name, Vec::new());
        }
    }
    if let Some(usage) = observed.usage {
        trace.set([
            KeyValue::new("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", i64::from(usage.completion_tokens)),
            KeyValue::new("gen_ai.usage.cache_read.input_tokens", i64::from(usage.cached_tokens)),
        ]);
    }
    if let Some(reason) = &observed.finish_reason {
        trace.set([KeyValue::new("gen_ai.response.finish_reasons", strings([reason.clone()]))]);
    }
    if let Err(failure) = outcome {
        trace.fail(failure.class.name());
    }
}
