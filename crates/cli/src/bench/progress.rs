//! What a run shows while it goes on: plain lines on standard error.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use servelab_bench::live::{Live, LiveView};
use servelab_bench::result::{Load, Repeat, Trial};
use servelab_bench::session::Observer;

/// Between two lines of a repeat.
const EVERY: Duration = Duration::from_secs(5);

/// One line when a repeat begins and ends, and every few seconds in between.
#[derive(Default)]
pub struct Lines {
    ticker: Option<(Sender<()>, JoinHandle<()>)>,
}

/// Standard error may be closed; that is no reason to stop measuring.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

impl Observer for Lines {
    fn begins(&mut self, load: &Load, repeat: u32, repeats: u32, live: Arc<Live>) {
        say(&format!("{load}: repeat {repeat} of {repeats}"));
        let (stop, stopped) = channel();
        let ticker = std::thread::spawn(move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                say(&shown(&live.view()));
            }
        });
        self.ticker = Some((stop, ticker));
    }

    fn ended(&mut self, _load: &Load, repeat: &Repeat) {
        if let Some((stop, ticker)) = self.ticker.take() {
            drop(stop);
            // It only prints.
            let _ = ticker.join();
        }
        let metrics = &repeat.metrics;
        say(&format!(
            "  {} of {} completed, {:.2} req/s, {:.1} output tokens/s, TTFT p50 {:.1} ms, TPOT p50 {:.2} ms",
            metrics.completed,
            metrics.requests,
            metrics.request_throughput,
            metrics.output_throughput,
            metrics.ttft_ms.median,
            metrics.tpot_ms.median
        ));
        for fault in repeat.faults() {
            say(&format!("  ! {fault}"));
        }
    }

    fn judged(&mut self, trial: &Trial) {
        let kept = if trial.kept { "kept" } else { "broken" };
        say(&format!("  SLO {kept} at {:.4} req/s: {}", trial.rate, trial.reason));
    }
}

fn shown(view: &LiveView) -> String {
    let ms = |time: Duration| 1000.0 * time.as_secs_f64();
    format!(
        "  {:>5.0} s  {} sent, {} in flight, {} completed, {} failed, TTFT p50 {:.1} ms, ITL p50 {:.2} ms",
        view.now.as_secs_f64(),
        view.sent,
        view.in_flight,
        view.completed,
        view.failed,
        ms(view.ttft_median),
        ms(view.itl_median)
    )
}
