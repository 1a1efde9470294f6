//! A TCP stream that knows when its bytes arrived.
//!
//! On Linux the kernel notes the time at which a packet came in (`SO_TIMESTAMPNS`) and hands it out with the bytes.
//! So a client that reads late, because the machine is busy, still tells when the token was there, and the
//! difference tells how late it was. Elsewhere the time is that of the read.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::clock::Clock;
use crate::histogram::Histogram;
use crate::result::ArrivalClock;

/// Most bytes taken in one read.
const READ_BYTES: usize = 16 * 1024;

/// Of all connections of a client.
#[derive(Debug, Default)]
pub struct Reads(Mutex<ReadStats>);

/// How late reads were.
#[derive(Clone, Debug, Default)]
pub struct ReadStats {
    /// From the arrival in the kernel to the read, of those reads that have the kernel's time.
    pub lag: Histogram,
    pub reads: u64,
}

impl Reads {
    pub fn stats(&self) -> ReadStats {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn record(&self, lag: Option<Duration>) {
        let mut stats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stats.reads += 1;
        if let Some(lag) = lag {
            stats.lag.record(lag);
        }
    }
}

/// A socket that nobody sends to. The kernel notes times while there is at least one socket that wants them, and
/// begins a moment after the first: this one is there before the requests are.
#[derive(Debug)]
pub struct Sentinel {
    _socket: Option<std::net::UdpSocket>,
}

impl Sentinel {
    /// Without one only the first packets have no time of their own.
    pub fn open() -> Self {
        let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).ok();
        #[cfg(target_os = "linux")]
        if let Some(socket) = &socket {
            let _ =
                nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::ReceiveTimestampns, &true);
        }
        Self { _socket: socket }
    }
}

impl ReadStats {
    /// Not all, because the very first packets may have no time.
    pub fn clock(&self) -> ArrivalClock {
        let enough = self.lag.count() as f64 >= 0.95 * self.reads as f64;
        if self.reads > 0 && enough { ArrivalClock::Kernel } else { ArrivalClock::Read }
    }
}

/// What has arrived on a connection; shared with whoever handles the bytes.
#[derive(Debug, Default)]
pub struct Traffic {
    bytes: AtomicU64,
    arrival_nanos: AtomicU64,
}

impl Traffic {
    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// When the last of them arrived.
    pub fn arrival(&self) -> Duration {
        Duration::from_nanos(self.arrival_nanos.load(Ordering::Relaxed))
    }

    /// Arrivals do not go back, whatever the wall clock does.
    fn record(&self, bytes: usize, arrival: Duration) {
        let nanos = u64::try_from(arrival.as_nanos()).unwrap_or(u64::MAX);
        self.arrival_nanos.fetch_max(nanos, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

pub struct Socket {
    stream: TcpStream,
    clock: Clock,
    traffic: Arc<Traffic>,
    reads: Arc<Reads>,
    receiver: Receiver,
}

impl Socket {
    /// Connects to the first address that answers.
    ///
    /// # Errors
    /// That of the last address.
    pub async fn connect(addresses: &[SocketAddr], clock: Clock, reads: &Arc<Reads>) -> io::Result<Self> {
        let stream = TcpStream::connect(addresses).await?;
        stream.set_nodelay(true)?;
        let receiver = Receiver::new(&stream);
        Ok(Self { stream, clock, traffic: Arc::default(), reads: reads.clone(), receiver })
    }

    pub fn traffic(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(this.stream.poll_read_ready(cx))?;
            let Self { stream, receiver, .. } = &mut *this;
            let room = out.remaining();
            match stream.try_io(Interest::READABLE, || receiver.receive(stream, room)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok((bytes, lag)) => {
                    let arrival = this.clock.now().saturating_sub(lag.unwrap_or_default());
                    if bytes > 0 {
                        this.traffic.record(bytes, arrival);
                        this.reads.record(lag);
                    }
                    out.put_slice(&this.receiver.buffer[..bytes]);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Reads bytes and, where the kernel tells it, how long they had been there.
#[cfg(target_os = "linux")]
struct Receiver {
    buffer: Box<[u8]>,
    control: Vec<u8>,
}

#[cfg(target_os = "linux")]
impl Receiver {
    fn new(stream: &TcpStream) -> Self {
        use nix::sys::socket::{setsockopt, sockopt::ReceiveTimestampns};
        // Without it the reads carry no time, and the statistics say so.
        let _ = setsockopt(stream, ReceiveTimestampns, &true);
        Self {
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
            control: nix::cmsg_space!(nix::sys::time::TimeSpec),
        }
    }

    fn receive(&mut self, stream: &TcpStream, room: usize) -> io::Result<(usize, Option<Duration>)> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        use std::os::fd::AsRawFd;
        let room = room.min(self.buffer.len());
        let mut slices = [io::IoSliceMut::new(&mut self.buffer[..room])];
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut self.control), MsgFlags::empty())?;
        let stamps = message.cmsgs().ok().into_iter().flatten();
        let lag = stamps.into_iter().find_map(|control| match control {
            ControlMessageOwned::ScmTimestampns(stamp) => lag(Duration::from(stamp)),
            _ => None,
        });
        Ok((message.bytes, lag))
    }
}

/// How long ago `stamp` was on the wall clock. `None` if that makes no sense, because the clock was set between.
#[cfg(target_os = "linux")]
fn lag(stamp: Duration) -> Option<Duration> {
    const SENSIBLE: Duration = Duration::from_secs(60);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    now.checked_sub(stamp).filter(|lag| *lag < SENSIBLE)
}

#[cfg(not(target_os = "linux"))]
struct Receiver {
    buffer: Box<[u8]>,
}

#[cfg(not(target_os = "linux"))]
impl Receiver {
    fn new(_stream: &TcpStream) -> Self {
        Self { buffer: vec![0; READ_BYTES].into_boxed_slice() }
    }

    fn receive(&mut self, stream: &TcpStream, room: usize) -> io::Result<(usize, Option<Duration>)> {
        let room = room.min(self.buffer.len());
        stream.try_read(&mut self.buffer[..room]).map(|bytes| (bytes, None))
    }
}
