//! The same client over TLS.

use std::path::Path;
use std::sync::Arc;

use servelab_bench::client::{Client, Target};
use servelab_bench::measure::failures;
use servelab_bench::result::{FailureClass, RequestRecord};
use servelab_bench::run::LoadShape;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;

use crate::server::{HEAD, last_token_and_usage, measure_with, plan, timeouts};

fn file(name: &str) -> std::path::PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http/tls")).join(name)
}

/// Answers every request with one token. Returns its port.
async fn serve() -> u16 {
    let certificate = CertificateDer::from_pem_file(file("cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(file("key.pem")).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that does not trust the certificate hangs up.
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut request = [0; 4096];
                while stream.read(&mut request).await.is_ok_and(|bytes| bytes > 0) {
                    let answer = format!("{HEAD}{}", last_token_and_usage(1));
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    stream.flush().await.unwrap();
                }
            });
        }
    });
    port
}

async fn three_requests(target: Target) -> servelab_bench::run::RunLog {
    let client = Client::new(target, None, timeouts()).await.unwrap();
    let shape = LoadShape::Closed { concurrency: 1, think_time: std::time::Duration::ZERO };
    measure_with(&client, &plan(shape, 3), 4, CancellationToken::new()).await
}

#[tokio::test]
async fn a_server_whose_authority_is_trusted_is_measured() {
    let port = serve().await;
    let target = Target::parse(&format!("https://localhost:{port}")).unwrap();
    let run = three_requests(target.trusting(&file("ca.pem")).unwrap()).await;
    assert!(run.records.iter().all(RequestRecord::is_completed), "{:?}", failures(&run.records));
    // One handshake serves all of them.
    assert_eq!(run.records.iter().filter(|record| record.connect_seconds.is_some()).count(), 1);
    if cfg!(target_os = "linux") {
        assert!(run.reads.unwrap().lag.count() > 0, "the kernel's times are lost below TLS");
    }
}

#[tokio::test]
async fn a_server_that_nobody_vouches_for_is_unreachable() {
    let port = serve().await;
    let run = three_requests(Target::parse(&format!("https://localhost:{port}")).unwrap()).await;
    let counts = failures(&run.records);
    assert_eq!((counts[0].class, counts[0].all), (FailureClass::Unreachable, 3));
    assert!(counts[0].example.contains("certificate"), "{}", counts[0].example);
}
