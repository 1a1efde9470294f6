//! The orderly way down: not ready at once, running requests finish, what is left when the time is over
//! ends with an error.
//!
//! The socket stays open meanwhile: a balancer may go on sending for some seconds, and an answer of 503
//! that names the reason is better than a refused connection.

use std::time::Duration;

use tokio::sync::oneshot;

use crate::app::{App, Phase};
use crate::engine_thread::{Command, EngineEnd};

/// How long answers that were cut have to leave their places, and the engine to end its step.
const AFTER_CUT: Duration = Duration::from_secs(2);

/// Returns when no request is inside any more and the engine's thread has ended, or has not in time.
pub async fn drain(app: &App, timeout: Duration, ended: oneshot::Receiver<EngineEnd>) {
    app.enter(Phase::Draining);
    let Some(model) = app.loaded_model() else { return };
    let live = model.admission.live();
    tracing::info!(live, timeout_seconds = timeout.as_secs_f64(), "draining");
    if tokio::time::timeout(timeout, model.admission.empty()).await.is_err() {
        tracing::warn!(live = model.admission.live(), "time to drain is over; the rest end with an error");
        app.cut.cancel();
        let _ = tokio::time::timeout(AFTER_CUT, model.admission.empty()).await;
    }
    // A step that hangs must not keep the process: its thread is left behind.
    let _ = tokio::time::timeout(AFTER_CUT, async {
        let _ = model.commands.send(Command::Stop).await;
        let _ = ended.await;
    })
    .await;
}
