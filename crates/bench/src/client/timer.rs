//! A timer that is exact to tens of microseconds. The runtime's own counts whole milliseconds, which is as much as
//! a fast server's time to first token may differ by.

use std::time::Instant;

/// Waits for one point in time after the other. Takes a file descriptor once it has to wait.
#[derive(Default)]
pub struct Timer {
    #[cfg(target_os = "linux")]
    file: Option<tokio::io::unix::AsyncFd<KernelTimer>>,
}

#[cfg(target_os = "linux")]
impl Timer {
    /// Returns at once if `at` has passed.
    pub async fn until(&mut self, at: Instant) {
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        self.file = self.file.take().or_else(open);
        let armed = self.file.as_ref().filter(|file| arm(&file.get_ref().0, left).is_ok());
        if let Some(file) = armed {
            // An earlier wait that was given up may have left its ring behind.
            while let Ok(mut ring) = file.readable().await {
                ring.clear_ready();
                if Instant::now() >= at {
                    return;
                }
            }
        }
        tokio::time::sleep_until(at.into()).await;
    }
}

/// A timer of the kernel; where none can be had, that of the runtime does.
#[cfg(target_os = "linux")]
#[expect(
    deprecated,
    reason = "its replacement is unsafe; the timer owns its descriptor to its end, as that demands"
)]
fn open() -> Option<tokio::io::unix::AsyncFd<KernelTimer>> {
    use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).ok()?;
    tokio::io::unix::AsyncFd::new(KernelTimer(timer)).ok()
}

#[cfg(target_os = "linux")]
struct KernelTimer(nix::sys::timerfd::TimerFd);

#[cfg(target_os = "linux")]
impl std::os::fd::AsRawFd for KernelTimer {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsFd;
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(target_os = "linux")]
fn arm(timer: &nix::sys::timerfd::TimerFd, left: std::time::Duration) -> nix::Result<()> {
    use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
    timer.set(Expiration::OneShot(left.into()), TimerSetTimeFlags::empty())
}

#[cfg(not(target_os = "linux"))]
impl Timer {
    /// Returns at once if `at` has passed.
    pub async fn until(&mut self, at: Instant) {
        tokio::time::sleep_until(at.into()).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Never early; how late depends on the machine.
    #[tokio::test]
    async fn it_rings_after_its_time_again_and_again() {
        let mut timer = Timer::default();
        for micros in [1500, 0, 300, 20_000, 50] {
            let at = Instant::now() + Duration::from_micros(micros);
            timer.until(at).await;
            assert!(Instant::now() >= at, "{micros}");
        }
        timer.until(Instant::now() - Duration::from_secs(1)).await;
    }
}
