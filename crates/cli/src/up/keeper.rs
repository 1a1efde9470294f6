//! Keeps a replica running, as a kubelet does: one that ends by itself is started again at the same address, after a
//! pause that doubles with every time.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::child::{Program, Server};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// One that has run for that long is taken to be well.
const WELL_AFTER: Duration = Duration::from_secs(60);

/// Something that a user of the lab should see.
#[derive(Debug)]
pub enum Happened {
    /// A server ended that nobody had asked to.
    Ended {
        name: String,
        how: String,
    },
    Restarted {
        name: String,
        address: String,
        pid: Option<u32>,
    },
}

/// Runs until `stop`, then takes the replica down.
pub fn keep(
    mut server: Server,
    mut program: Program,
    happened: UnboundedSender<Happened>,
    stop: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        program.port = server.port();
        let mut pause = FIRST_PAUSE;
        loop {
            let began = Instant::now();
            let how = tokio::select! {
                how = server.ended() => how,
                () = stop.cancelled() => return server.stop().await,
            };
            // Nobody listens once the lab goes down.
            let _ = happened.send(Happened::Ended { name: program.name.clone(), how });
            if began.elapsed() > WELL_AFTER {
                pause = FIRST_PAUSE;
            }
            server = loop {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => return,
                }
                pause = (2 * pause).min(LONGEST_PAUSE);
                match Server::start(&program).await {
                    Ok(server) => break server,
                    Err(error) => {
                        let (name, how) = (program.name.clone(), error.to_string());
                        let _ = happened.send(Happened::Ended { name, how });
                    }
                }
            };
            let (name, address) = (program.name.clone(), server.address.clone());
            let _ = happened.send(Happened::Restarted { name, address, pid: server.pid() });
        }
    })
}
