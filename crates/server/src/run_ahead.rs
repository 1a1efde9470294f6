//! Keeps making an answer while its reader is slow.

use futures::Stream;
use tokio::sync::mpsc;

use crate::errors::ApiError;
use crate::generation::{Delta, Generation};

/// The deltas of a generation, as fast as the reader takes them, or, with `ahead`, as fast as they come.
///
/// Stop strings are found when events become text. If that waited for a slow reader, the engine would
/// compute far beyond the stop; so answers with stop strings are made by a task of their own. What the
/// reader has not taken is bounded like the events: by the request's `max_tokens`.
pub fn deltas(generation: Generation, ahead: bool) -> impl Stream<Item = Result<Delta, ApiError>> + Send {
    async_stream::stream! {
        if !ahead {
            let mut generation = generation;
            loop {
                match generation.next().await {
                    Ok(Some(delta)) => yield Ok(delta),
                    Ok(None) => return,
                    Err(error) => {
                        yield Err(error);
                        return;
                    }
                }
            }
        }
        let (sender, mut receiver) = mpsc::channel(generation.most_deltas());
        let _task = AbortOnDrop(tokio::spawn(pump(generation, sender)));
        while let Some(delta) = receiver.recv().await {
            yield delta;
        }
    }
}

async fn pump(mut generation: Generation, sender: mpsc::Sender<Result<Delta, ApiError>>) {
    loop {
        let delta = match generation.next().await {
            Ok(None) => return,
            Ok(Some(delta)) => Ok(delta),
            Err(error) => Err(error),
        };
        let last = delta.is_err();
        if sender.send(delta).await.is_err() || last {
            return;
        }
    }
}

/// The reader's end of the task: when the body is dropped, so is the generation.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
