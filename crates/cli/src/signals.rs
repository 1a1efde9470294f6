//! What ends a program: signals, and the end of the parent that started it.

/// Set by a parent that keeps this program's standard input open and writes nothing: the end of the input says that the
/// parent wants it to end, or is gone.
pub const PARENT_VARIABLE: &str = "SERVELAB_ENDS_WITH_INPUT";

/// Ready on the first SIGTERM or SIGINT, or at the end of the parent. A second signal ends the program at once, for
/// those who do not want to wait for the drain.
pub async fn stop() {
    tokio::select! {
        () = next() => {}
        () = orphaned() => {}
    }
    tracing::info!("asked to stop; once more ends the program at once");
    tokio::spawn(async {
        next().await;
        std::process::exit(1);
    });
}

/// Ready when the parent closes the input; never without one that asked for it.
async fn orphaned() {
    if std::env::var_os(PARENT_VARIABLE).is_none() {
        return std::future::pending().await;
    }
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // An input that cannot be read has ended too.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = tell.send(());
    });
    let _ = told.await;
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
