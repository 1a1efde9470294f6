//! An answer on its way through: read from the replica only as fast as the client takes it, with no buffer between.
//! Dropping it closes the connection to the replica. A client that does not read at all asks for nothing, so that no
//! poll can notice that its time is over: [`super::unread`] does.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::flight::Flight;
use super::unread::{Place, Unread};
use super::whole_events::WholeEvents;
use crate::errors::RouterError;
use crate::options::Timeouts;

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
        let passing =
            Passing { first, rest, events, timeouts, timer, last, end, cut, flight, state: State::Passing };
        let passing = Arc::new(Mutex::new(Some(passing)));
        let place = unread.watch(passing.clone(), end);
        Self { passing, timeouts, _place: place }
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
    first: Option<Frame<Bytes>>,
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Passing,
    /// All has come from the replica.
    Last,
    Ended,
}

impl Passing {
    fn next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
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
    fn fail(&mut self, error: RouterError) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        self.state = State::Ended;
        self.flight.failed();
        if self.events.is_some() {
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from(error.event())))));
        }
        Poll::Ready(Some(Err(error)))
    }

    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RouterError>>> {
        loop {
            if let Some(whole) = self.events.as_mut().and_then(WholeEvents::pop) {
                return Poll::Ready(Some(Ok(Frame::data(whole))));
            }
            match self.state {
                State::Ended => return Poll::Ready(None),
                State::Last => {
                    self.state = State::Ended;
                    self.flight.answered(None);
                    return Poll::Ready(None);
                }
                State::Passing => {}
            }
            match ready!(self.next(context)) {
                Some(Ok(frame)) => {
                    let Some(events) = &mut self.events else { return Poll::Ready(Some(Ok(frame))) };
                    match frame.into_data() {
                        Ok(data) => {
                            self.flight.events(&data);
                            events.push(data);
                        }
                        Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                    }
                }
                Some(Err(error)) => return self.fail(error),
                None => {
                    self.state = State::Last;
                    if let Some(events) = &mut self.events {
                        events.pass_rest();
                    }
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
