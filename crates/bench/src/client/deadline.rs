//! The time-outs of one request: first byte, then idle, and the total over all.
//!
//! One timer, armed for the next moment at which something may be over. A chunk does not touch it: when it rings,
//! it looks at how long ago the last bytes came.

use std::pin::Pin;
use std::task::Context;
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use super::{Failure, Timeouts};
use crate::result::FailureClass;

pub struct Deadline {
    sleep: Pin<Box<Sleep>>,
    timeouts: Timeouts,
    sent: Instant,
    /// Set once the answer has begun.
    last_bytes: Option<Instant>,
}

impl Deadline {
    pub fn new(timeouts: Timeouts) -> Self {
        let sent = Instant::now();
        let mut deadline =
            Self { sleep: Box::pin(tokio::time::sleep(Duration::ZERO)), timeouts, sent, last_bytes: None };
        deadline.arm();
        deadline
    }

    /// Bytes have come.
    pub fn heard(&mut self) {
        let first = self.last_bytes.is_none();
        self.last_bytes = Some(Instant::now());
        if first {
            self.arm();
        }
    }

    /// What is over, if something is. Wakes the task when that may have changed.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Option<Failure> {
        while self.sleep.as_mut().poll(cx).is_ready() {
            let (due, class) = self.next();
            if Instant::now() >= due {
                return Some(self.failure(class));
            }
            self.arm();
        }
        None
    }

    fn arm(&mut self) {
        let (due, _) = self.next();
        self.sleep.as_mut().reset(due.into());
    }

    fn next(&self) -> (Instant, FailureClass) {
        let total = (self.sent + self.timeouts.total, FailureClass::TotalTimeout);
        let waiting = match self.last_bytes {
            None => (self.sent + self.timeouts.first_byte, FailureClass::FirstByteTimeout),
            Some(last) => (last + self.timeouts.idle, FailureClass::Stall),
        };
        if waiting.0 < total.0 { waiting } else { total }
    }

    fn failure(&self, class: FailureClass) -> Failure {
        let message = match class {
            FailureClass::FirstByteTimeout => {
                format!("no byte of an answer within {:?}", self.timeouts.first_byte)
            }
            FailureClass::Stall => format!("the answer stood still for {:?}", self.timeouts.idle),
            _ => format!("no end of the answer within {:?}", self.timeouts.total),
        };
        Failure::new(class, message)
    }
}
