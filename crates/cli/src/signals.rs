//! The signals that end a replica.

/// Ready on the first SIGTERM or SIGINT. A second one ends the program at once, for those who do not want
/// to wait for the drain.
pub async fn stop() {
    next().await;
    tracing::info!("asked to stop; once more ends the program at once");
    tokio::spawn(async {
        next().await;
        std::process::exit(1);
    });
}

#[cfg(unix)]
async fn next() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signals cannot be received; the program can only be killed");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(not(unix))]
async fn next() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
