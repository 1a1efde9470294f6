//! servelab's stream, `GET /kv/events`: see [`servelab_wire::kv_events::stream`].

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use servelab_wire::kv_events::stream::KvMessage;
use servelab_wire::sse::SseReader;

use super::End;
use super::feed::Feed;
use crate::choice::fleet::Knowledge;
use crate::replicas::client::Client;

/// Longest silence: three heartbeats.
const SILENCE: Duration = Duration::from_secs(15);
/// Until the first word, for which the replica's engine has to end its step.
const FIRST_WORD: Duration = Duration::from_secs(120);
/// A piece of a snapshot has at most some hundred blocks.
const MAX_MESSAGE_BYTES: usize = 32 << 20;

/// Follows the stream to its end.
pub async fn follow(feed: &mut Feed, client: &Client, key: Option<&HeaderValue>) -> End {
    let mut body = match open(feed, client, key).await {
        Ok(response) => response.into_body(),
        Err(end) => return end,
    };
    if feed.position.is_none() {
        feed.reset();
    }
    let mut reader = SseReader::bounded(MAX_MESSAGE_BYTES);
    let mut patience = FIRST_WORD;
    loop {
        let frame = match tokio::time::timeout(patience, body.frame()).await {
            Err(_) => return End::Lost(format!("nothing came for {} s", patience.as_secs())),
            Ok(None) => return End::Lost("the replica ended the stream".into()),
            Ok(Some(Err(error))) => return End::Lost(error.to_string()),
            Ok(Some(Ok(frame))) => frame,
        };
        patience = SILENCE;
        let Ok(bytes) = frame.into_data() else { continue };
        let mut taken = Ok(());
        let read = reader.read(&bytes, |text| {
            if taken.is_ok() {
                taken = take(feed, text);
            }
        });
        if let Err(end) = read.map_err(|error| End::Lost(error.to_string())).and(taken) {
            // After nonsense only a snapshot helps.
            feed.position = None;
            return end;
        }
    }
}

async fn open(feed: &Feed, client: &Client, key: Option<&HeaderValue>) -> Result<Response<Incoming>, End> {
    let path = match &feed.position {
        Some((stream, next)) => format!("/kv/events?from={next}&stream={stream}"),
        None => "/kv/events".to_owned(),
    };
    let cannot = || End::Unsupported("its address makes no URL".into());
    let mut request = Request::get(feed.replica.address.uri(&path).ok_or_else(cannot)?);
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, key);
    }
    let request = request.body(Full::<Bytes>::default()).map_err(|_| cannot())?;
    let response = match tokio::time::timeout(FIRST_WORD, client.request(request)).await {
        Err(_) => return Err(End::Lost("no answer".into())),
        Ok(Err(error)) => return Err(End::Lost(error.to_string())),
        Ok(Ok(response)) => response,
    };
    let is_stream = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
    match response.status() {
        StatusCode::OK if is_stream => Ok(response),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(End::Unsupported("it asks for a key; give the router one with --replica-key-file".into()))
        }
        status if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => {
            Err(End::Lost(format!("it answered {status}")))
        }
        status => Err(End::Unsupported(format!("it answered {status}, and no stream"))),
    }
}

/// One message of the stream.
fn take(feed: &mut Feed, text: &str) -> Result<(), End> {
    // How an orderly end reads.
    if text == "[DONE]" {
        return Ok(());
    }
    let bad = |error: &dyn std::fmt::Display| End::Lost(format!("a message makes no sense: {error}"));
    let message: KvMessage = serde_json::from_str(text).map_err(|error| bad(&error))?;
    let next = feed.position.as_ref().map(|(_, next)| *next);
    match message {
        KvMessage::Snapshot { stream, next, more, events } => {
            // Until the last piece is there, there is nothing to go on with.
            if feed.position.take().is_some() {
                feed.reset();
            }
            feed.gather(&events).map_err(|error| bad(&error))?;
            if !more {
                feed.position = Some((stream, next));
                feed.publish(Knowledge::Precise);
            }
        }
        KvMessage::Resumed { .. } => feed.publish(Knowledge::Precise),
        KvMessage::Batch { seq, events } if Some(seq) == next => {
            if let Some((_, next)) = &mut feed.position {
                *next = seq + 1;
            }
            feed.apply(&events).map_err(|error| bad(&error))?;
        }
        KvMessage::Heartbeat { next: told } if Some(told) == next => {}
        KvMessage::Batch { seq: other, .. } | KvMessage::Heartbeat { next: other } => {
            feed.stats().gap();
            return Err(End::Lost(format!("number {other} came where {next:?} should have")));
        }
        KvMessage::Gap { oldest } => {
            feed.stats().gap();
            return Err(End::Lost(format!("the router was too slow; only {oldest} and later is kept")));
        }
    }
    Ok(())
}
