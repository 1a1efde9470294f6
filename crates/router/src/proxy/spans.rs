//! What the trace of a request says about its way through the router: how long it waited, who was chosen and why, and
//! every attempt. The replica that gets an attempt goes on below the attempt's span.

use std::future::Future;
use std::time::Duration;

use http::StatusCode;
use servelab_telemetry::RequestTrace;
use servelab_telemetry::traces::{Child, KeyValue, OpenSpan, SpanKind};

use super::attempt::{Attempt, Failed};
use crate::choice::policy::Policy;
use crate::errors::RouterError;
use crate::metrics::Outcome;
use crate::prompt::Asked;
use crate::replicas::address::Address;
use crate::replicas::registry::Chosen;
use crate::usage::Used;

/// What was read of the request.
pub fn tell_request(trace: &RequestTrace, asked: &Asked) {
    trace.set([
        KeyValue::new("gen_ai.request.stream", asked.streams),
        KeyValue::new("servelab.prompt.estimated_tokens", i64::from(asked.prompt.tokens)),
    ]);
}

/// Adds the time that something takes to the trace.
pub async fn timed<T>(trace: &RequestTrace, name: &'static str, part: impl Future<Output = T>) -> T {
    let _span = trace.open(name, SpanKind::Internal, Vec::new());
    part.await
}

/// A choice that began at `since` and has just been made.
pub fn tell_choice(trace: &RequestTrace, since: Duration, policy: Policy, chosen: Option<&Chosen>) {
    if !trace.is_recorded() {
        return;
    }
    let mut attributes = vec![KeyValue::new("servelab.policy", policy.name())];
    if let Some(Chosen { replica, decision, .. }) = chosen {
        attributes.push(KeyValue::new("servelab.replica", replica.address.to_string()));
        attributes.push(KeyValue::new("servelab.reason", decision.reason.name()));
        if let Some(terms) = decision.terms() {
            attributes.push(KeyValue::new("servelab.matched_tokens", i64::from(terms.matched_tokens)));
            attributes.push(KeyValue::new("servelab.cost_seconds", terms.cost_seconds()));
        }
    }
    trace.child(Child { name: "choose", from: since, to: trace.elapsed(), attributes, events: Vec::new() });
}

/// The span of an attempt; it lasts until the answer ends, the attempt fails, or another one has answered first.
pub fn of_attempt(trace: &RequestTrace, replica: &Address, which: Attempt) -> OpenSpan {
    let attributes = || {
        let (host, port) = replica.authority().rsplit_once(':').unwrap_or((replica.authority(), "0"));
        vec![
            KeyValue::new("server.address", host.to_owned()),
            KeyValue::new("server.port", port.parse().unwrap_or(0_i64)),
            KeyValue::new("http.request.resend_count", i64::from(which.number) - 1),
            KeyValue::new("servelab.hedge", which.is_hedge),
        ]
    };
    let attributes = if trace.is_recorded() { attributes() } else { Vec::new() };
    trace.open("attempt", SpanKind::Client, attributes)
}

pub fn tell_first_byte(span: &mut OpenSpan, status: StatusCode) {
    span.event("first_byte", Vec::new());
    span.set([KeyValue::new("http.response.status_code", i64::from(status.as_u16()))]);
}

pub fn tell_failed(span: &mut OpenSpan, failed: &Failed) {
    if let Some(answer) = &failed.answer {
        span.set([KeyValue::new("http.response.status_code", i64::from(answer.0.status.as_u16()))]);
    }
    span.fail(failed.fault.name());
}

/// What the replica said that the answer took.
pub fn tell_used(trace: &RequestTrace, used: Option<Used>, predicted_hit_tokens: u32) {
    let Some(used) = used.filter(|_| trace.is_recorded()) else { return };
    trace.set([
        KeyValue::new("gen_ai.usage.input_tokens", i64::from(used.prompt_tokens)),
        KeyValue::new("gen_ai.usage.output_tokens", i64::from(used.completion_tokens)),
        KeyValue::new("gen_ai.usage.cache_read.input_tokens", i64::from(used.cached_tokens)),
        KeyValue::new("servelab.predicted_hit_tokens", i64::from(predicted_hit_tokens)),
    ]);
}

/// Why the router itself gives no answer.
pub fn tell_error(trace: &RequestTrace, error: &RouterError) {
    let code = error.code().unwrap_or("router_error");
    if error.status().is_server_error() { trace.fail(code) } else { trace.set_error_type(code) }
}

pub fn tell_outcome(trace: &RequestTrace, outcome: Outcome) {
    trace.set([KeyValue::new("servelab.outcome", outcome.name())]);
    if outcome == Outcome::Failed {
        trace.fail("failed");
    }
}
