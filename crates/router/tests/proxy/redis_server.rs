//! A real Redis (Debian: redis-server) on a free port, which ends with the test.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::Commands;

pub struct RedisServer {
    pub port: u16,
    process: Child,
}

/// Whether `redis-server` is not here. In CI it must be.
pub fn is_missing() -> bool {
    let found = Command::new("redis-server").arg("--version").output();
    if found.is_ok_and(|output| output.status.success()) {
        return false;
    }
    assert!(std::env::var_os("CI").is_none(), "redis-server is not installed, and CI has to have it");
    let line = b"SKIPPED a test against Redis: install redis-server (Debian: redis-server)\n";
    std::io::stderr().write_all(line).unwrap();
    true
}

impl RedisServer {
    pub fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::on(port)
    }

    /// Waits until it answers.
    pub fn on(port: u16) -> Self {
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &port.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { port, process };
        let answers = || {
            let client = redis::Client::open(server.url()).ok()?;
            client.get_connection_with_timeout(Duration::from_secs(1)).ok()?.ping::<String>().ok()
        };
        for _ in 0..600 {
            if answers().is_some() {
                return server;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("redis-server does not answer on port {port}");
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn connection(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    pub fn keys(&self) -> Vec<String> {
        self.connection().keys("*").unwrap()
    }

    /// Stands still, connections and all, or goes on.
    pub fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
