//! An answer on its way through: read from the replica only as fast as the client takes it, with no buffer between but
//! that of events that come at once.
//! Dropping it closes the connection to the replica. A client that does not read at all asks for nothing, so that no
//! poll can notice that its time is over: [`super::unread`] does.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::flight::Flight;
use super::turn::Turn;
use super::unread::{Place, Unread};
use super::whole_events::WholeEvents;
use crate::errors::RouterError;
use crate::options::Timeouts;

/// Bytes of events that are gathered before they pass.
const MOST_AT_ONCE: usize = 16 * 1024;

/// What ends an answer before it has ended by itself.
pub struct Limits {
    pub timeouts: Timeouts,
    /// When the whole of it must be there.
    pub end: Instant,
    /// Ends it at once.
    pub cut: CancellationToken,
}

pub struct AnswerBody {
    /// `None` once its time was over and nobody read.
    passing: Arc<Mutex<Option<Passing>>>,
    timeouts: Timeouts,
    _place: Place,
}

impl AnswerBody {
    /// `first` came already.
    pub fn new(
        first: Option<Frame<Bytes>>,
        rest: Incoming,
        is_events: bool,
        flight: Flight,
        limits: Limits,
        unread: &Arc<Unread>,
    ) -> Self {
        let Limits { timeouts, end, cut } = limits;
        let last = Instant::now();
        let timer = Box::pin(tokio::time::sleep_until(end.min(last + timeouts.idle)));
        let events = is_events.then(WholeEvents::default);
        let cut = Box::pin(cut.cancelled_owned());
        let mut passing = Passing {
            rest,
            events,
            timeouts,
            timer,
            last,
            end,
            cut,
            flight,
            state: State::Passing,
            other: None,
            may_pass: false,
            turn: None,
        };
        if let Some(first) = first {
            passing.take_in(Some(Ok(first)));
        }
        let passing = Arc::new(Mutex::new(Some(passing)));
        let place = unread.watch(passing.clone(), end);
        Self { passing, timeouts, _place: place }
    }

    /// Waits for what passes first, so that it goes with the head of the answer.
    pub async fn gather(&self) {
        poll_fn(|context| match &mut *self.passing.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(passing) => passing.poll_gather(context),
            None => Poll::Ready(()),
        })
        .await;
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = RouterError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        match &mut *self.passing.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(passing) => passing.poll_frame(context),
            None => Poll::Ready(Some(Err(RouterError::Total(self.timeouts.total)))),
        }
    }
}

/// An answer of which something may still come.
pub struct Passing {
    rest: Incoming,
    /// Of a stream of server-sent events.
    events: Option<WholeEvents>,
    timeouts: Timeouts,
    /// Rings at the end of everything, or at the end of a silence that began at `last` or earlier.
    timer: Pin<Box<Sleep>>,
    /// When the replica said something last.
    last: Instant,
    end: Instant,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    flight: Flight,
    state: State,
    /// What has come and is no event: a piece of something else, or what follows the last event.
    other: Option<Frame<Bytes>>,
    /// What has come passes now.
    may_pass: bool,
    /// While other tasks have theirs.
    turn: Option<Turn>,
}

#[derive(Debug)]
enum State {
    Passing,
    /// Nothing more comes from the replica, by its own will or not; what has come passes first.
    Last(Option<RouterError>),
    Ended,
}

impl Passing {
    fn next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        match Pin::new(&mut self.rest).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                self.last = Instant::now();
                // One that never pauses never comes to the timer.
                if self.last >= self.end {
                    return Poll::Ready(Some(Err(self.timed_out())));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::warn!(error = %Causes(&error), "a replica broke off in the middle of an answer");
                Poll::Ready(Some(Err(RouterError::Cut)))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                if self.cut.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Some(Err(RouterError::Drained)));
                }
                ready!(self.poll_end(context));
                Poll::Ready(Some(Err(self.timed_out())))
            }
        }
    }

    /// Ready when there was silence for too long, or the time is over. The timer is set anew when it rings and not with
    /// each piece of the answer.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(context));
            let due = self.end.min(self.last + self.timeouts.idle);
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(due);
        }
    }

    fn timed_out(&self) -> RouterError {
        let Timeouts { idle, total, .. } = self.timeouts;
        if Instant::now() >= self.end { RouterError::Total(total) } else { RouterError::Idle(idle) }
    }

    /// A stream of events ends with one that says why, and without `[DONE]`. Anything else can only break.
    fn fail(&mut self) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        let State::Last(Some(error)) = std::mem::replace(&mut self.state, State::Ended) else {
            return Poll::Ready(None);
        };
        self.flight.failed();
        if self.events.is_some() {
            return Poll::Ready(Some(Ok(Frame::data(error.event()))));
        }
        Poll::Ready(Some(Err(error)))
    }

    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        loop {
            if self.may_pass {
                let whole = self.events.as_mut().and_then(WholeEvents::take).map(Frame::data);
                if let Some(frame) = whole.or_else(|| self.other.take()) {
                    return Poll::Ready(Some(Ok(frame)));
                }
                self.may_pass = false;
                match &mut self.state {
                    State::Ended => return Poll::Ready(None),
                    State::Last(Some(_)) => return self.fail(),
                    State::Last(None) => {
                        self.state = State::Ended;
                        self.flight.answered(None);
                        return Poll::Ready(None);
                    }
                    State::Passing => {}
                }
            }
            ready!(self.poll_gather(context));
        }
    }

    /// Ready when something may pass, or nothing more comes. The task that reads from the replica hands over one piece
    /// at a time: it has a turn before what it has given so far passes, since a piece for itself costs both sides a call
    /// to the kernel.
    fn poll_gather(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while matches!(self.state, State::Passing) && self.other.is_none() && self.gathered() < MOST_AT_ONCE {
            match self.next(context) {
                Poll::Ready(next) => {
                    self.turn = None;
                    self.take_in(next);
                }
                Poll::Pending if self.gathered() == 0 => return Poll::Pending,
                Poll::Pending if self.turn.get_or_insert_with(|| Turn::give(context)).is_over() => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        self.turn = None;
        self.may_pass = true;
        Poll::Ready(())
    }

    /// Bytes of events that may pass.
    fn gathered(&self) -> usize {
        self.events.as_ref().map_or(0, WholeEvents::ready_bytes)
    }

    fn take_in(&mut self, next: Option<Result<Frame<Bytes>, RouterError>>) {
        match (next, &mut self.events) {
            (Some(Ok(frame)), Some(events)) => match frame.into_data() {
                Ok(data) => {
                    self.flight.events(&data);
                    events.push(data);
                }
                Err(trailers) => {
                    events.pass_rest();
                    self.other = Some(trailers);
                }
            },
            (Some(Ok(frame)), None) => self.other = Some(frame),
            (Some(Err(error)), _) => self.state = State::Last(Some(error)),
            (None, events) => {
                self.state = State::Last(None);
                if let Some(events) = events {
                    events.pass_rest();
                }
            }
        }
    }
}

/// An error and what it came from, in one line.
pub struct Causes<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Causes<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(formatter, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
