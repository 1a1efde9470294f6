//! Exporters that no test machine has: NVIDIA's dcgm-exporter, kube-state-metrics and KEDA's operator, as text that a small
//! server gives out. exporters/README.md says where names and labels are from, and that the values are made up.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const DCGM: &str = include_str!("exporters/dcgm.prom");
const KUBE_STATE_METRICS: &str = include_str!("exporters/kube-state-metrics.prom");
const KEDA: &str = include_str!("exporters/keda.prom");

/// All three, each on a port of its own, until they are dropped.
pub struct Exporters {
    pub dcgm: Exporter,
    pub kube_state_metrics: Exporter,
    pub keda: Exporter,
}

impl Exporters {
    pub async fn start() -> Self {
        Self {
            dcgm: Exporter::start(DCGM).await,
            kube_state_metrics: Exporter::start(KUBE_STATE_METRICS).await,
            keda: Exporter::start(KEDA).await,
        }
    }
}

/// The names of all their metrics.
pub fn names() -> BTreeSet<String> {
    let lines = [DCGM, KUBE_STATE_METRICS, KEDA].into_iter().flat_map(str::lines);
    let typed = lines.filter_map(|line| line.strip_prefix("# TYPE ")?.split_whitespace().next());
    typed.map(str::to_owned).collect()
}

/// Answers every request with the same text, but for a Deployment that is scaled from scrape to scrape.
pub struct Exporter {
    pub address: String,
    serving: JoinHandle<()>,
}

impl Exporter {
    async fn start(text: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let scrapes = Arc::new(AtomicU32::new(0));
        let serving = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = scrapes.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(answer(client, scaled(text, number)));
            }
        });
        Self { address, serving }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// One replica more with every second scrape.
fn scaled(text: &str, scrape: u32) -> String {
    let spec = r#"kube_deployment_spec_replicas{namespace="servelab",deployment="servelab"} "#;
    text.replace(&format!("{spec}4"), &format!("{spec}{}", 4 + scrape % 2))
}

async fn answer(mut client: TcpStream, body: String) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match client.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    );
    let _ = client.write_all(answer.as_bytes()).await;
}
