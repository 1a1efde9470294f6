//! What a run shows while it goes on, on standard error: on a terminal a few lines that are drawn again, elsewhere a
//! line every few seconds.
//!
//! A thread of its own looks at the counters a few times a second, so that the one that measures neither writes nor
//! waits for a terminal.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use servelab_bench::live::{Live, LiveView};
use servelab_bench::phases::{Extent, PhasePlan};
use servelab_bench::result::{Load, Repeat, Trial};
use servelab_bench::session::{self, Loads, Observer, Settings};
use servelab_bench::workload::Workload;

/// How often the lines on a terminal are drawn again.
const DRAWN_EVERY: Duration = Duration::from_millis(200);
const DRAWS_PER_SECOND: u8 = 5;
/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Rates are those of that long before.
const RATE_OVER: Duration = Duration::from_secs(3);
/// Characters of the bar.
const PARTS: usize = 40;

/// Where it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    Terminal,
    Lines,
}

/// Watches a benchmark.
pub struct Progress {
    place: Place,
    /// What is measured at each level; of a search, at all of them.
    plans: Vec<PhasePlan>,
    /// Requests there are, if they come to an end.
    requests: Option<u64>,
    /// Levels that have begun.
    level: usize,
    is_search: bool,
    viewer: Option<(Sender<()>, JoinHandle<()>)>,
}

/// When a repeat will be over.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Goal {
    Requests(u64),
    Time(Duration),
    /// Requests are counted after a time that warms up, or the other way round.
    Unknown,
}

impl Progress {
    /// `is_quiet`: shows nothing.
    pub fn new(settings: &Settings, workload: &Workload, is_quiet: bool) -> Self {
        let plan = |shape| session::default_phases(settings, shape, workload);
        let (plans, is_search) = match &settings.loads {
            Loads::Ladder(shapes) => (shapes.iter().map(plan).collect(), false),
            Loads::Search { arrivals, max_concurrency, .. } => {
                let (arrivals, max_concurrency) = (arrivals.clone(), *max_concurrency);
                (vec![plan(&servelab_bench::run::LoadShape::Open { arrivals, max_concurrency })], true)
            }
        };
        // A terminal that cannot move its cursor (TERM=dumb) counts as none.
        let can_redraw = !ProgressDrawTarget::stderr().is_hidden();
        let place = match (is_quiet, can_redraw) {
            (true, _) => Place::Nowhere,
            (false, true) => Place::Terminal,
            (false, false) => Place::Lines,
        };
        Self { place, plans, requests: workload.requests, level: 0, is_search, viewer: None }
    }

    /// Such as `concurrency 16, repeat 2 of 3, level 4 of 6`.
    fn title(&self, load: &Load, repeat: u32, repeats: u32) -> String {
        let mut title = load.to_string();
        if repeats > 1 {
            title += &format!(", repeat {repeat} of {repeats}");
        }
        match (self.is_search, self.plans.len()) {
            (true, _) => title += &format!(", trial {}", self.level),
            (false, 1) => {}
            (false, levels) => title += &format!(", level {} of {levels}", self.level),
        }
        title
    }

    fn goal(&self) -> Goal {
        let plan = self.plans.get(self.level.saturating_sub(1)).or(self.plans.last());
        match plan.map(|plan| (plan.warm_up, plan.measured)) {
            Some((Extent::Requests(before), Extent::Requests(measured))) => {
                let wanted = before.saturating_add(measured);
                Goal::Requests(self.requests.map_or(wanted, |there| there.min(wanted)))
            }
            Some((Extent::Time(before), Extent::Time(measured))) => Goal::Time(before + measured),
            Some((Extent::Requests(0), Extent::Time(measured))) => Goal::Time(measured),
            _ => Goal::Unknown,
        }
    }

    fn say(&self, line: &str) {
        if self.place != Place::Nowhere {
            // Standard error may be closed; that is no reason to stop measuring.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

impl Observer for Progress {
    fn begins(&mut self, load: &Load, repeat: u32, repeats: u32, live: Arc<Live>) {
        self.level += usize::from(repeat == 1);
        let (title, goal) = (self.title(load, repeat, repeats), self.goal());
        let (stop, stopped) = channel();
        let viewer = match self.place {
            Place::Nowhere => return,
            Place::Terminal => std::thread::spawn(move || draw(&title, goal, &live, &stopped)),
            Place::Lines => {
                self.say(&title);
                std::thread::spawn(move || write_lines(goal, &live, &stopped))
            }
        };
        self.viewer = Some((stop, viewer));
    }

    fn ended(&mut self, load: &Load, repeat: &Repeat) {
        if let Some((stop, viewer)) = self.viewer.take() {
            drop(stop);
            // It only shows.
            let _ = viewer.join();
        }
        let metrics = &repeat.metrics;
        let place = if self.place == Place::Terminal {
            format!("{load}, repeat {}:", repeat.repeat)
        } else {
            " ".into()
        };
        self.say(&format!(
            "{place} {} of {}, {:.2} req/s, {:.0} tokens/s, TTFT p50 {:.1} ms, TPOT p50 {:.2} ms",
            metrics.completed,
            metrics.requests,
            metrics.request_throughput,
            metrics.output_throughput,
            metrics.ttft_ms.median,
            metrics.tpot_ms.median
        ));
        for fault in repeat.faults() {
            self.say(&format!("  ! {fault}"));
        }
    }

    fn judged(&mut self, trial: &Trial) {
        let kept = if trial.kept { "kept" } else { "broken" };
        self.say(&format!("  SLO {kept} at {:.4} req/s: {}", trial.rate, trial.reason));
    }
}

/// A bar and two lines of figures, until the sender is gone.
fn draw(title: &str, goal: Goal, live: &Live, stopped: &Receiver<()>) {
    let block = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
    if let Ok(style) = ProgressStyle::with_template("{msg}") {
        block.set_style(style);
    }
    let (start, mut pace) = (Instant::now(), Pace::default());
    while stopped.recv_timeout(DRAWN_EVERY) == Err(RecvTimeoutError::Timeout) {
        let (view, elapsed) = (live.view(), start.elapsed());
        pace.look(elapsed, &view);
        let share = goal.share(elapsed, &view);
        // All in one message: everything that is set by itself is drawn by itself.
        let bar = share.map_or(String::new(), bar);
        let (timing, counts, latencies) = (timing(elapsed, share), counts(&view, &pace), latencies(&view));
        block.set_message(format!("{title}\n  {bar}{timing}\n  {counts}\n  {latencies}"));
    }
    block.finish_and_clear();
}

fn bar(share: f64) -> String {
    let full = (share * PARTS as f64) as usize;
    format!("{}{} ", "\u{2588}".repeat(full), "\u{2591}".repeat(PARTS - full))
}

/// A line every few seconds, until the sender is gone.
fn write_lines(goal: Goal, live: &Live, stopped: &Receiver<()>) {
    let (start, mut pace) = (Instant::now(), Pace::default());
    while stopped.recv_timeout(LINE_EVERY) == Err(RecvTimeoutError::Timeout) {
        let (view, elapsed) = (live.view(), start.elapsed());
        pace.look(elapsed, &view);
        let timing = timing(elapsed, goal.share(elapsed, &view));
        let _ = writeln!(std::io::stderr(), "  {timing}; {}; {}", counts(&view, &pace), latencies(&view));
    }
}

impl Goal {
    /// How much of it is done, at most 1.
    fn share(self, elapsed: Duration, view: &LiveView) -> Option<f64> {
        let share = match self {
            Self::Requests(wanted) => (view.completed + view.failed) as f64 / wanted.max(1) as f64,
            Self::Time(wanted) => elapsed.as_secs_f64() / wanted.as_secs_f64().max(1e-3),
            Self::Unknown => return None,
        };
        Some(share.min(1.0))
    }
}

/// Rates over the last seconds.
#[derive(Debug, Default)]
struct Pace {
    /// When, how many requests had ended, how many deltas had come.
    looks: VecDeque<(Duration, u64, u64)>,
}

impl Pace {
    fn look(&mut self, elapsed: Duration, view: &LiveView) {
        self.looks.push_back((elapsed, view.completed + view.failed, view.deltas));
        while self.looks.len() > 2 && elapsed.saturating_sub(self.looks[1].0) >= RATE_OVER {
            self.looks.pop_front();
        }
    }

    /// Requests and deltas a second.
    fn rates(&self) -> (f64, f64) {
        let (Some(first), Some(last)) = (self.looks.front(), self.looks.back()) else { return (0.0, 0.0) };
        // After a single look: since the beginning.
        let first = if self.looks.len() == 1 { (Duration::ZERO, 0, 0) } else { *first };
        let seconds = (last.0 - first.0).as_secs_f64().max(1e-3);
        ((last.1 - first.1) as f64 / seconds, (last.2 - first.2) as f64 / seconds)
    }
}

fn timing(elapsed: Duration, share: Option<f64>) -> String {
    let seconds = elapsed.as_secs_f64();
    match share {
        Some(share) if share >= 1.0 => format!("100 %  {seconds:.0} s"),
        Some(share) if share > 0.02 => {
            let left = seconds * (1.0 - share) / share;
            format!("{:.0} %  {seconds:.0} s, about {left:.0} s left", 100.0 * share)
        }
        Some(share) => format!("{:.0} %  {seconds:.0} s", 100.0 * share),
        None => format!("{seconds:.0} s"),
    }
}

fn counts(view: &LiveView, pace: &Pace) -> String {
    let (requests, deltas) = pace.rates();
    let LiveView { completed, failed, in_flight, .. } = view;
    format!(
        "{completed} completed, {failed} failed, {in_flight} in flight, {requests:.1} req/s, {deltas:.0} tokens/s"
    )
}

fn latencies(view: &LiveView) -> String {
    let ms = |time: Duration| {
        let ms = 1000.0 * time.as_secs_f64();
        if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.1}") }
    };
    format!(
        "TTFT p50 {} ms, p99 {} ms; ITL p50 {} ms, p99 {} ms",
        ms(view.ttft_median),
        ms(view.ttft_p99),
        ms(view.itl_median),
        ms(view.itl_p99)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(completed: u64, failed: u64, deltas: u64) -> LiveView {
        LiveView { completed, failed, in_flight: 16, deltas, ..LiveView::default() }
    }

    #[test]
    fn rates_are_those_of_the_last_seconds() {
        let mut pace = Pace::default();
        assert_eq!(pace.rates(), (0.0, 0.0));
        pace.look(Duration::from_secs(2), &view(8, 0, 100));
        assert_eq!(pace.rates(), (4.0, 50.0));
        for second in 3..=20 {
            pace.look(Duration::from_secs(second), &view(10 * second, second, 1000 * second));
        }
        assert_eq!(pace.rates(), (11.0, 1000.0));
        assert!(pace.looks.len() < 8, "{:?}", pace.looks);
    }

    #[test]
    fn what_is_done_is_a_share_of_the_goal() {
        let second = Duration::from_secs(1);
        assert_eq!(Goal::Requests(40).share(second, &view(9, 1, 0)), Some(0.25));
        // Requests that only keep up the load come on top.
        assert_eq!(Goal::Requests(40).share(second, &view(50, 0, 0)), Some(1.0));
        assert_eq!(Goal::Time(4 * second).share(second, &view(0, 0, 0)), Some(0.25));
        assert_eq!(Goal::Unknown.share(second, &view(9, 0, 0)), None);
    }

    #[test]
    fn the_lines_fit_a_terminal() {
        let mut pace = Pace::default();
        let view = LiveView { ttft_p99: Duration::from_secs(1234), ..view(1_000_000, 99_999, 200_000_000) };
        pace.look(Duration::from_secs(1000), &view);
        let lines = [counts(&view, &pace), latencies(&view), timing(Duration::from_secs(99_999), Some(0.5))];
        assert_eq!(lines[0], "1000000 completed, 99999 failed, 16 in flight, 1100.0 req/s, 200000 tokens/s");
        assert_eq!(lines[1], "TTFT p50 0.00 ms, p99 1234000.0 ms; ITL p50 0.00 ms, p99 0.00 ms");
        assert_eq!(lines[2], "50 %  99999 s, about 99999 s left");
        assert!(lines.iter().all(|line| line.len() < 98));
    }
}
