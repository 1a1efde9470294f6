//! vLLM's stream: batches over ZeroMQ, and a replay of the last ones for whoever missed some.
//!
//! It has no snapshot. A router that is there from the first batch on, or gets all of them replayed, knows everything;
//! one that comes later knows what changed since, and goes on guessing the rest.

use std::time::Duration;

use servelab_wire::kv_events::zmq::{KvBatch, REPLAY_END};
use zeromq::{DealerSocket, Socket, SocketEvent, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use super::End;
use super::feed::Feed;
use crate::choice::fleet::Knowledge;

/// Where the sockets of a replica are, on the host of its address.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    pub port: u16,
    pub replay_port: Option<u16>,
}

/// How long connecting, and each step of a replay, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most batches of a replay: more than vLLM keeps by default.
const MAX_REPLAYED: usize = 100_000;

/// A batch and its number.
struct Numbered {
    seq: u64,
    batch: KvBatch,
}

/// What the stream has said so far.
struct Stream<'a> {
    feed: &'a mut Feed,
    replay: Option<String>,
    /// The number that comes next, and the time of the batch before it.
    next: Option<(u64, f64)>,
}

/// Follows the stream until it breaks.
pub async fn follow(feed: &mut Feed, addresses: Addresses) -> End {
    let authority = feed.replica.address.authority();
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).to_owned();
    let address = |port: u16| format!("tcp://{host}:{port}");
    let mut socket = SubSocket::new();
    let mut events = socket.monitor();
    let publish = address(addresses.port);
    match tokio::time::timeout(PATIENCE, socket.connect(&publish)).await {
        Err(_) => return End::Lost(format!("{publish} does not answer")),
        Ok(Err(error)) => return End::Lost(format!("{publish}: {error}")),
        Ok(Ok(_)) => {}
    }
    if let Err(error) = socket.subscribe("").await {
        return End::Lost(format!("{publish}: {error}"));
    }
    let replay = addresses.replay_port.map(address);
    // Another run may answer at the same address: nothing of before is good.
    feed.reset();
    feed.position = None;
    let mut stream = Stream { feed, replay, next: None };
    if let Err(end) = stream.begin().await {
        return end;
    }
    loop {
        let message = tokio::select! {
            message = socket.recv() => message,
            event = futures::StreamExt::next(&mut events) => match event {
                Some(SocketEvent::Disconnected(_)) => return End::Lost(format!("{publish} is disconnected")),
                Some(_) => continue,
                None => return End::Lost("the socket is gone".into()),
            },
        };
        let taken = match message {
            Ok(message) => match numbered(&message.into_vec(), 1) {
                Ok(numbered) => stream.take(numbered).await,
                Err(end) => Err(end),
            },
            Err(error) => Err(End::Lost(format!("{publish}: {error}"))),
        };
        if let Err(end) = taken {
            return end;
        }
    }
}

/// Reads `[.., SEQ, BATCH]`, the number being frame `at`.
fn numbered(frames: &[bytes::Bytes], at: usize) -> Result<Numbered, End> {
    let [seq, payload] = frames.get(at..).unwrap_or_default() else {
        return Err(End::Lost(format!(
            "a message has {} frames; a topic, a number and a batch belong",
            frames.len()
        )));
    };
    let seq = <[u8; 8]>::try_from(&seq[..]).map(u64::from_be_bytes);
    let seq = seq.map_err(|_| End::Lost("a sequence number has not eight bytes".into()))?;
    let batch =
        KvBatch::decode(payload).map_err(|error| End::Lost(format!("a batch makes no sense: {error}")))?;
    Ok(Numbered { seq, batch })
}

impl Stream<'_> {
    /// With all that can be had of the past.
    async fn begin(&mut self) -> Result<(), End> {
        let past = self.replayed(0).await?;
        let knowledge = match past.first() {
            Some(first) if first.seq == 0 => Knowledge::Precise,
            _ => Knowledge::Partial,
        };
        self.start_with(past, knowledge)
    }

    fn start_with(&mut self, past: Vec<Numbered>, knowledge: Knowledge) -> Result<(), End> {
        self.feed.reset();
        self.next = None;
        for Numbered { seq, batch } in past {
            self.feed.gather(&batch.events).map_err(|error| End::Lost(error.to_string()))?;
            self.next = Some((seq + 1, batch.ts));
        }
        self.feed.publish(knowledge);
        Ok(())
    }

    /// The next batch, whatever its number.
    async fn take(&mut self, new: Numbered) -> Result<(), End> {
        match self.next {
            Some((next, last)) if new.seq < next => {
                // It was replayed already, or the replica begins anew.
                if new.batch.ts > last {
                    self.feed.stats().gap();
                    self.begin().await?;
                    return Box::pin(self.after_replay(new)).await;
                }
                Ok(())
            }
            Some((next, _)) if new.seq > next => {
                self.feed.stats().gap();
                self.fill_gap(next, new).await
            }
            None if new.seq == 0 => {
                self.feed.knows(Knowledge::Precise);
                self.apply(new)
            }
            _ => self.apply(new),
        }
    }

    /// A batch that may be among those just replayed.
    async fn after_replay(&mut self, new: Numbered) -> Result<(), End> {
        match self.next {
            Some((next, _)) if new.seq < next => Ok(()),
            Some((next, _)) if new.seq > next => {
                Err(End::Lost(format!("{next} is missing, and {} came", new.seq)))
            }
            _ => {
                if self.next.is_none() && new.seq == 0 {
                    self.feed.knows(Knowledge::Precise);
                }
                self.apply(new)
            }
        }
    }

    /// What was missed, if it can be had; otherwise everything is forgotten, since a removal may have been missed.
    async fn fill_gap(&mut self, next: u64, new: Numbered) -> Result<(), End> {
        let missed = self.replayed(next).await?;
        if missed.first().is_some_and(|first| first.seq == next) {
            for numbered in missed {
                self.apply(numbered)?;
            }
            return self.after_replay(new).await;
        }
        tracing::warn!(replica = %self.feed.replica.address, from = next, to = new.seq, "KV events were missed");
        self.start_with(Vec::new(), Knowledge::Partial)?;
        self.apply(new)
    }

    fn apply(&mut self, new: Numbered) -> Result<(), End> {
        if let Some((next, _)) = self.next
            && next != new.seq
        {
            return Err(End::Lost(format!("number {} came where {next} should have", new.seq)));
        }
        self.next = Some((new.seq + 1, new.batch.ts));
        self.feed.apply(&new.batch.events).map_err(|error| End::Lost(error.to_string()))
    }

    /// The batches from a number on that the replica still has; none without a replay address.
    async fn replayed(&self, from: u64) -> Result<Vec<Numbered>, End> {
        let Some(address) = &self.replay else { return Ok(Vec::new()) };
        let lost = |error: &dyn std::fmt::Display| End::Lost(format!("{address}: {error}"));
        let mut socket = DealerSocket::new();
        let slow = |_| lost(&"no answer");
        tokio::time::timeout(PATIENCE, socket.connect(address))
            .await
            .map_err(slow)?
            .map_err(|error| lost(&error))?;
        let frames = vec![bytes::Bytes::new(), from.to_be_bytes().to_vec().into()];
        let request = ZmqMessage::try_from(frames).map_err(|error| lost(&error))?;
        socket.send(request).await.map_err(|error| lost(&error))?;
        let mut batches = Vec::new();
        while batches.len() < MAX_REPLAYED {
            let answer = tokio::time::timeout(PATIENCE, socket.recv()).await.map_err(slow)?;
            let frames = answer.map_err(|error| lost(&error))?.into_vec();
            if frames.get(1).is_some_and(|seq| seq[..] == REPLAY_END) {
                return Ok(batches);
            }
            batches.push(numbered(&frames, 1)?);
        }
        Err(lost(&format!("the replay has more than {MAX_REPLAYED} batches")))
    }
}
