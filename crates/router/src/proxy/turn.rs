//! A turn for every other task that is ready, before this one goes on.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

/// [`tokio::task::yield_now`] for a `poll` that may be called again meanwhile, which would end that one too early.
pub struct Turn(Arc<Passed>);

struct Passed {
    is_over: AtomicBool,
    task: Waker,
}

impl Turn {
    /// Wakes the task of `context` when the others have had it.
    pub fn give(context: &Context<'_>) -> Self {
        let passed = Arc::new(Passed { is_over: AtomicBool::new(false), task: context.waker().clone() });
        let waker = Waker::from(passed.clone());
        // It hands the waker to the scheduler at once; what is left of it knows nothing more.
        let _ = pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&waker));
        Self(passed)
    }

    pub fn is_over(&self) -> bool {
        self.0.is_over.load(Ordering::Acquire)
    }
}

impl Wake for Passed {
    fn wake(self: Arc<Self>) {
        self.is_over.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Mutex;
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn others_go_on_before_and_polls_between_change_nothing() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let others = said.clone();
        let other = tokio::spawn(async move {
            for number in 0..3 {
                others.lock().unwrap().push(number);
                // Ready again at once, so that it still belongs to the same turn.
                tokio::task::consume_budget().await;
            }
        });
        let mut turn = None;
        poll_fn(|context| {
            let turn = turn.get_or_insert_with(|| Turn::give(context));
            // As if somebody had polled twice.
            if turn.is_over() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        said.lock().unwrap().push(9);
        other.await.unwrap();
        assert_eq!(*said.lock().unwrap(), [0, 1, 2, 9]);
    }
}
