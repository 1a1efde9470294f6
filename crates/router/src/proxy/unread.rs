//! Ends answers whose time is over and whose client does not read: nothing asks for their next piece, so that only
//! somebody else can close the connection to the replica. One task looks after all of them; a timer and a task for each
//! answer would cost more than passing it on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use slab::Slab;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::stream::Passing;

/// After the end of everything, for those who read to hear why; and how often the others are looked for.
const GRACE: Duration = Duration::from_secs(1);

type Shared = Arc<Mutex<Option<Passing>>>;

/// The answers under way, and when each must have ended.
#[derive(Default)]
pub struct Unread(Mutex<Slab<(Instant, Shared)>>);

/// Dropping it says that the answer has gone.
pub struct Place {
    unread: Arc<Unread>,
    number: usize,
}

impl Unread {
    /// Takes `passing` away some time after `end` if the place is still there.
    pub fn watch(self: &Arc<Self>, passing: Shared, end: Instant) -> Place {
        let number = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((end, passing));
        Place { unread: self.clone(), number }
    }

    /// Ends what is overdue, and everything once `cut` is cancelled. Never returns.
    pub async fn end_overdue(&self, cut: &CancellationToken) {
        loop {
            let was_cut = cut.is_cancelled();
            tokio::select! {
                () = tokio::time::sleep(GRACE) => {
                    let now = Instant::now();
                    self.end(|end| was_cut || end + GRACE <= now);
                }
                () = cut.cancelled(), if !was_cut => {}
            }
        }
    }

    fn end(&self, is_over: impl Fn(Instant) -> bool) {
        let over: Vec<_> = {
            let answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let over = answers.iter().filter(|(_, (end, _))| is_over(*end));
            over.map(|(_, (_, passing))| passing.clone()).collect()
        };
        // What counts the request is dropped with it, and must not find the lock taken.
        for passing in over {
            let over = passing.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(over);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let gone = self.unread.0.lock().unwrap_or_else(PoisonError::into_inner).try_remove(self.number);
        drop(gone);
    }
}
