//! One request from its arrival to the last byte of its answer: what it holds, and what is counted when it ends.
//! Everything is a guard, so that it ends in the same way whether the answer was whole, broke, or nobody wanted it.

use std::sync::Arc;

use servelab_telemetry::RequestTrace;
use servelab_telemetry::traces::OpenSpan;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::spans;
use crate::app::App;
use crate::choice::load::Dispatch;
use crate::limits::{Reservation, queue};
use crate::metrics::Outcome;
use crate::replicas::registry::Ticket;
use crate::usage::{StreamUsage, Used};

/// Inside the router. Dropped without an outcome, the client has left.
pub struct Visit {
    app: Arc<App>,
    outcome: Outcome,
    trace: RequestTrace,
    _tracked: TaskTrackerToken,
}

impl Visit {
    pub fn new(app: &Arc<App>, trace: RequestTrace) -> Self {
        app.metrics.requests_in_flight.inc();
        Self { app: app.clone(), outcome: Outcome::Left, trace, _tracked: app.inside.token() }
    }

    pub fn trace(&self) -> &RequestTrace {
        &self.trace
    }

    pub fn set(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.app.metrics.requests_in_flight.dec();
        self.app.metrics.ended(self.outcome);
        spans::tell_outcome(&self.trace, self.outcome);
    }
}

/// What a request holds at the router's limits.
#[derive(Default)]
pub struct Admission {
    pub reservation: Option<Reservation>,
    pub inside: Option<queue::Inside>,
}

/// The attempt that answers.
pub struct Sent {
    pub dispatch: Dispatch,
    pub ticket: Ticket,
    pub span: OpenSpan,
}

/// A request whose answer has begun.
pub struct Flight {
    pub visit: Visit,
    pub admission: Admission,
    pub sent: Sent,
    /// The answer is not an error.
    pub is_success: bool,
    pub expected: Expected,
    usage: StreamUsage,
    used: Option<Used>,
}

/// What the router expected of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    /// Of all prompts.
    pub prompt_tokens: u32,
    pub hit_tokens: u32,
    /// The replica was matched by its own tokens, and the prompt has that many of them.
    pub exact_tokens: Option<u32>,
}

impl Flight {
    pub fn new(visit: Visit, admission: Admission, sent: Sent, is_success: bool, expected: Expected) -> Self {
        let (usage, used) = (StreamUsage::default(), None);
        Self { visit, admission, sent, is_success, expected, usage, used }
    }

    /// A piece of a stream of events passes.
    pub fn events(&mut self, bytes: &[u8]) {
        self.sent.dispatch.first_token();
        self.usage.push(bytes);
    }

    /// The answer is whole.
    pub fn answered(&mut self, used: Option<Used>) {
        self.used = used;
        self.visit.set(Outcome::Answered);
        self.sent.ticket.succeeded();
    }

    /// The replica broke off or fell silent.
    pub fn failed(&mut self) {
        self.visit.set(Outcome::Failed);
        self.sent.ticket.failed();
        self.sent.span.fail("broken_off");
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let app = &self.visit.app;
        let used = self.used.or(self.usage.used());
        spans::tell_used(&self.visit.trace, used, self.expected.hit_tokens);
        if let Some(used) = used {
            app.metrics.prompt_tokens.inc_by(used.prompt_tokens.into());
            app.metrics.confirmed_hit_tokens.inc_by(used.cached_tokens.into());
            app.metrics.predicted_hit_tokens.inc_by(self.expected.hit_tokens.into());
            app.registry.completed(used.completion_tokens, self.sent.dispatch.sequences());
            // Every answer is a canary too.
            if self.expected.exact_tokens.is_some_and(|tokens| tokens != used.prompt_tokens) {
                app.metrics.token_count_mismatches.inc();
                self.sent.ticket.doubt_parity();
            }
        }
        let Some(reservation) = self.admission.reservation.take() else { return };
        let now = app.registry.now();
        match used {
            Some(used) => {
                reservation.settle(now, u64::from(used.prompt_tokens) + u64::from(used.completion_tokens))
            }
            None if !self.is_success => reservation.settle(now, 0),
            // A stream that does not tell has about a token an event.
            None if self.usage.events() > 0 => {
                reservation
                    .settle(now, u64::from(self.expected.prompt_tokens) + u64::from(self.usage.events()));
            }
            None => {}
        }
    }
}
