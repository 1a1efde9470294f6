//! One request from its arrival to the last byte of its answer: what it holds, and what is counted when it ends.
//! Everything is a guard, so that it ends in the same way whether the answer was whole, broke, or nobody wanted it.

use std::sync::Arc;

use tokio_util::task::task_tracker::TaskTrackerToken;

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
    _tracked: TaskTrackerToken,
}

impl Visit {
    pub fn new(app: &Arc<App>) -> Self {
        app.metrics.requests_in_flight.inc();
        Self { app: app.clone(), outcome: Outcome::Left, _tracked: app.inside.token() }
    }

    pub fn set(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.app.metrics.requests_in_flight.dec();
        self.app.metrics.ended(self.outcome);
    }
}

/// What a request holds at the router's limits.
#[derive(Default)]
pub struct Admission {
    pub reservation: Option<Reservation>,
    pub inside: Option<queue::Inside>,
}

/// A request whose answer has begun.
pub struct Flight {
    pub visit: Visit,
    pub admission: Admission,
    pub dispatch: Dispatch,
    pub ticket: Ticket,
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
    pub fn new(
        visit: Visit,
        admission: Admission,
        dispatch: Dispatch,
        ticket: Ticket,
        is_success: bool,
        expected: Expected,
    ) -> Self {
        let (usage, used) = (StreamUsage::default(), None);
        Self { visit, admission, dispatch, ticket, is_success, expected, usage, used }
    }

    /// A piece of a stream of events passes.
    pub fn events(&mut self, bytes: &[u8]) {
        self.dispatch.first_token();
        self.usage.push(bytes);
    }

    /// The answer is whole.
    pub fn answered(&mut self, used: Option<Used>) {
        self.used = used;
        self.visit.set(Outcome::Answered);
        self.ticket.succeeded();
    }

    /// The replica broke off or fell silent.
    pub fn failed(&mut self) {
        self.visit.set(Outcome::Failed);
        self.ticket.failed();
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let app = &self.visit.app;
        let used = self.used.or(self.usage.used());
        if let Some(used) = used {
            app.metrics.prompt_tokens.inc_by(used.prompt_tokens.into());
            app.metrics.confirmed_hit_tokens.inc_by(used.cached_tokens.into());
            app.metrics.predicted_hit_tokens.inc_by(self.expected.hit_tokens.into());
            // Every answer is a canary too.
            if self.expected.exact_tokens.is_some_and(|tokens| tokens != used.prompt_tokens) {
                app.metrics.token_count_mismatches.inc();
                self.ticket.doubt_parity();
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
