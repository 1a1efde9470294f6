//! A replica with nothing to do, to measure what a proxy in front of it costs.
//!
//!     cargo run --release -p servelab-router --example instant_server
//!
//! Speaks enough of the OpenAI API for load generators (`/v1/models`, `/v1/completions`), on a free port of 127.0.0.1
//! that it prints. Each token is a write of its own, as a model's tokens are. One thread for all connections: a
//! thread for each would have hundreds compete with the proxy whenever anything stalls for a moment. Ends when it is
//! killed.

use std::borrow::Cow;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::{StreamExt, stream};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpSocket;

const MODEL: &str = "instant";
const TOKEN: &str = " the";

#[tokio::main(flavor = "current_thread")]
#[expect(clippy::print_stdout, reason = "the address is this program's output")]
async fn main() -> std::io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    socket.set_nodelay(true)?;
    let listener = socket.listen(4096)?;
    println!("listening on http://{}", listener.local_addr()?);
    let router = Router::new()
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/health", get(async || Json(json!({}))))
        .route("/ready", get(async || Json(json!({}))));
    axum::serve(listener, router).await
}

async fn models() -> Json<Value> {
    let model = json!({"id": MODEL, "object": "model", "root": MODEL, "max_model_len": 1 << 20});
    Json(json!({"object": "list", "data": [model]}))
}

/// What is read of a request.
#[derive(Deserialize)]
struct Asked<'a> {
    #[serde(borrow)]
    prompt: Cow<'a, str>,
    max_tokens: Option<u64>,
    #[serde(default)]
    stream: bool,
}

async fn complete(body: Bytes) -> Response {
    let Ok(asked) = serde_json::from_slice::<Asked<'_>>(&body) else {
        return (StatusCode::BAD_REQUEST, "a prompt in words is wanted").into_response();
    };
    let tokens = asked.max_tokens.unwrap_or(16).max(1);
    // Words stand for tokens.
    let prompt = asked.prompt.split_whitespace().count() as u64;
    let usage = format!(
        r#"{{"prompt_tokens":{prompt},"completion_tokens":{tokens},"total_tokens":{}}}"#,
        prompt + tokens
    );
    if !asked.stream {
        let choice =
            format!(r#"{{"index":0,"text":"{}","finish_reason":"length"}}"#, TOKEN.repeat(tokens as usize));
        let answer = format!(r#"{{"choices":[{choice}],"usage":{usage}}}"#);
        return ([(CONTENT_TYPE, "application/json")], answer).into_response();
    }
    let token = |finish: &str| {
        event(&format!(r#"{{"index":0,"text":"{TOKEN}","logprobs":null,"finish_reason":{finish}}}"#), "null")
    };
    let last = token(r#""length""#) + &event("", &usage) + "data: [DONE]\n\n";
    let others = stream::iter(std::iter::repeat_n(token("null"), tokens as usize - 1)).then(async |token| {
        // What has been written goes out meanwhile.
        tokio::task::yield_now().await;
        token
    });
    let text = others.chain(stream::once(async { last })).map(Ok::<_, Infallible>);
    ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(text)).into_response()
}

fn event(choice: &str, usage: &str) -> String {
    format!(
        "data: {{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"{MODEL}\",\
         \"choices\":[{choice}],\"usage\":{usage}}}\n\n"
    )
}
