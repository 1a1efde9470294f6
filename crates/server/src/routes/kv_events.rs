//! `GET /kv/events`: what the prefix cache holds, then what it gains and loses, as server-sent events. See
//! [`servelab_wire::kv_events::stream`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::response::Response;
use futures::Stream;
use servelab_engine::KvEvent;
use servelab_wire::FieldError;
use servelab_wire::kv_events::stream::KvMessage;

use super::operate::ask;
use crate::app::App;
use crate::engine_thread::Command;
use crate::errors::ApiError;
use crate::kv_events::log::{Ended, Reader, Snapshot, Start};
use crate::kv_events::to_wire;
use crate::sse;

/// A stream that has nothing to tell says so that often.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Blocks of one piece of a snapshot.
const PIECE: usize = 512;

/// `?from=NEXT&stream=ID` goes on where an earlier stream ended, if that can be done.
pub async fn stream(
    State(app): State<Arc<App>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Response, ApiError> {
    let model = app.model()?;
    let from = from(&query)?;
    let id = model.kv.id().to_owned();
    let (reader, begin) = match model.kv.attach(from) {
        Start::Resumed(reader) => (reader, None),
        Start::Snapshot(reader, snapshot) => (reader, Some(snapshot)),
        Start::Ask(waiting) => {
            let snapshot = ask(model, Command::ListenToKv).await?;
            (waiting.reader(snapshot.next), Some(snapshot))
        }
    };
    Ok(sse::respond(messages(reader, id, begin, model.engine.block_size)))
}

fn from(query: &BTreeMap<String, String>) -> Result<Option<(&str, u64)>, FieldError> {
    if let Some(unknown) = query.keys().find(|name| !["from", "stream"].contains(&name.as_str())) {
        let name: String = unknown.chars().take(64).collect();
        return Err(FieldError::new(&name, format!("{name:?} is unknown here; there are from and stream")));
    }
    match (query.get("from"), query.get("stream")) {
        (None, None) => Ok(None),
        (Some(from), Some(stream)) => {
            let shown: String = from.chars().take(64).collect();
            let wrong =
                || FieldError::new("from", format!("from is {shown:?}; it must be a sequence number"));
            Ok(Some((stream, from.parse().map_err(|_| wrong())?)))
        }
        _ => Err(FieldError::new(
            "from",
            "from and stream belong together: the number to go on with, and the stream that it is of"
                .to_owned(),
        )),
    }
}

fn messages(
    mut reader: Reader,
    id: String,
    begin: Option<Arc<Snapshot>>,
    block_size: u32,
) -> impl Stream<Item = Result<KvMessage, ApiError>> + Send {
    async_stream::stream! {
        match begin {
            None => yield Ok(KvMessage::Resumed { stream: id, next: reader.next_seq() }),
            Some(snapshot) => {
                let pieces = snapshot.blocks.len().div_ceil(PIECE).max(1);
                for piece in 0..pieces {
                    let blocks = snapshot.blocks.iter().skip(piece * PIECE).take(PIECE);
                    let stored: Vec<_> = blocks.cloned().map(KvEvent::Stored).collect();
                    yield Ok(KvMessage::Snapshot {
                        stream: id.clone(),
                        next: snapshot.next,
                        more: piece + 1 < pieces,
                        events: to_wire(&stored, block_size, None),
                    });
                }
            }
        }
        loop {
            match tokio::time::timeout(HEARTBEAT, reader.next()).await {
                Err(_) => yield Ok(KvMessage::Heartbeat { next: reader.next_seq() }),
                Ok(Ok(batch)) => {
                    yield Ok(KvMessage::Batch { seq: batch.seq, events: to_wire(&batch.events, block_size, None) });
                }
                Ok(Err(Ended::Overtaken { oldest })) => {
                    yield Ok(KvMessage::Gap { oldest });
                    return;
                }
                Ok(Err(Ended::Closed)) => return,
            }
        }
    }
}
