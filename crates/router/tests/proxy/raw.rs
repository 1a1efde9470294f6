//! A replica that writes its own bytes: what HTTP forbids, or never ends, or stops in the middle.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::SockRef;

/// What it does with a request that generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// Writes this and closes in good order.
    Writes(&'static [u8]),
    /// Writes this and resets the connection.
    Resets(&'static [u8]),
    /// Writes this and says nothing more, the connection open.
    FallsSilent(&'static [u8]),
    /// Writes this, closes its half of the connection and leaves the other one open.
    HalfCloses(&'static [u8]),
    /// Writes the first, then the second again and again, as long as it is read.
    NeverEnds(&'static [u8], &'static [u8]),
    /// A head with that many header fields of 1000 bytes, and a good answer after it.
    Headers(usize),
}

/// A whole answer that is as it should be.
pub const GOOD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{\"raw\":true}";

/// Health checks are answered; everything else is as told. Its threads end with its connections.
pub struct Raw {
    pub address: SocketAddr,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    /// Requests that generate.
    came: AtomicUsize,
    /// Of these, connections that are open.
    inside: AtomicUsize,
    /// Bytes that the kernel took of what never ends.
    sent: AtomicUsize,
}

impl Raw {
    pub fn start(does: Does) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let of_thread = counts.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let counts = of_thread.clone();
                // The router may hang up at any moment; that ends the thread and nothing else.
                std::thread::spawn(move || converse(&stream, does, &counts));
            }
        });
        Self { address, counts }
    }

    pub fn came(&self) -> usize {
        self.counts.came.load(Ordering::SeqCst)
    }

    pub fn inside(&self) -> usize {
        self.counts.inside.load(Ordering::SeqCst)
    }

    pub fn sent(&self) -> usize {
        self.counts.sent.load(Ordering::SeqCst)
    }
}

fn converse(stream: &TcpStream, does: Does, counts: &Counts) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(path) = read_request(&mut reader)? {
        match path.as_str() {
            "/health" => (&mut &*stream).write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?,
            "/metrics" | "/tokenizer" => {
                (&mut &*stream).write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")?
            }
            _ => {
                counts.came.fetch_add(1, Ordering::SeqCst);
                counts.inside.fetch_add(1, Ordering::SeqCst);
                let done = act(stream, does, counts);
                counts.inside.fetch_sub(1, Ordering::SeqCst);
                if !done? {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Whether the connection goes on.
fn act(mut stream: &TcpStream, does: Does, counts: &Counts) -> std::io::Result<bool> {
    match does {
        Does::Writes(bytes) => {
            stream.write_all(bytes)?;
            // A good answer leaves the connection to the next request.
            return Ok(bytes.starts_with(GOOD));
        }
        Does::Resets(bytes) => {
            stream.write_all(bytes)?;
            // What was written is read before the reset throws it away.
            std::thread::sleep(Duration::from_millis(50));
            SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
        }
        Does::FallsSilent(bytes) => {
            stream.write_all(bytes)?;
            until_hung_up(stream)?;
        }
        Does::HalfCloses(bytes) => {
            stream.write_all(bytes)?;
            stream.shutdown(Shutdown::Write)?;
            until_hung_up(stream)?;
        }
        Does::NeverEnds(head, piece) => {
            stream.write_all(head)?;
            loop {
                stream.write_all(piece)?;
                counts.sent.fetch_add(piece.len(), Ordering::SeqCst);
            }
        }
        Does::Headers(count) => {
            let fields: String = (0..count).map(|at| format!("x-{at}: {}\r\n", "v".repeat(990))).collect();
            stream
                .write_all(format!("HTTP/1.1 200 OK\r\n{fields}content-length: 2\r\n\r\n{{}}").as_bytes())?;
        }
    }
    Ok(false)
}

fn until_hung_up(mut stream: &TcpStream) -> std::io::Result<()> {
    while stream.read(&mut [0; 1024])? > 0 {}
    Ok(())
}

/// The path; `None` once the router has hung up.
fn read_request(reader: &mut BufReader<&TcpStream>) -> std::io::Result<Option<String>> {
    let (mut path, mut length) = (None, 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        if path.is_none() {
            path = line.split(' ').nth(1).map(str::to_owned);
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
    Ok(path)
}
