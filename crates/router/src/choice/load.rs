//! How much work one replica has: modelled from what this router sent there, corrected by what the replica reports.
//!
//! Reports alone come too late: everything that arrives between two of them would go to the replica that looked idle
//! in the first. So each dispatch counts from the moment it is decided until its guard is dropped with the body of
//! the answer. What a report shows beyond that is work that came some other way (another router, a client that asked
//! the replica itself) and counts until the next report. (Dynamo's KV router models load in the same way, without the
//! correction.)

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What one request means for the replica that gets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Answers that are generated: `n` for each prompt.
    pub sequences: u32,
    /// Prompt tokens that the replica is expected to compute.
    pub prefill_tokens: u64,
    /// Prompt tokens in all.
    pub prompt_tokens: u64,
    /// Tokens that are likely to be in the KV cache halfway through the answer, all sequences together.
    pub context_tokens: u64,
}

/// What a replica says of itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    pub running: u32,
    pub waiting: u32,
    /// Share of the KV blocks that sequences hold, 0 to 1.
    pub kv_usage: f64,
}

/// The load of one replica at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadView {
    /// Dispatched by this router and not ended.
    pub in_flight: u32,
    /// Requests on the replica, whoever sent them.
    pub requests: u32,
    /// Of prompts that have no first token yet.
    pub pending_prefill_tokens: u64,
    /// Sequences that have their first token and not their last.
    pub decoding: u32,
    /// Share of the KV blocks that sequences hold, 0 to 1.
    pub kv_usage: f64,
}

/// The counts of one replica.
#[derive(Debug, Default)]
pub struct Load(Mutex<Counts>);

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Of the KV cache; 0 while it is not known.
    capacity_tokens: u64,
    in_flight: u32,
    /// Of these, how many have no first token yet.
    prefilling: u32,
    pending_prefill_tokens: u64,
    decoding: u32,
    context_tokens: u64,
    /// Prompt tokens of all dispatches so far, and how many there were.
    prompt_tokens: u64,
    prompts: u64,
    reported: Option<Reported>,
}

/// The last report, and what this router knew when it came.
#[derive(Clone, Copy, Debug)]
struct Reported {
    kv_usage: f64,
    context_tokens: u64,
    /// Requests that this router did not send.
    foreign_waiting: u32,
    foreign_running: u32,
}

impl Load {
    /// How many tokens the replica's KV cache holds.
    pub fn set_capacity(&self, tokens: u64) {
        self.counts().capacity_tokens = tokens;
    }

    /// Counts a request until the guard is dropped.
    pub fn dispatch(self: &Arc<Self>, work: Work) -> Dispatch {
        let mut counts = self.counts();
        counts.in_flight += 1;
        counts.prefilling += 1;
        counts.pending_prefill_tokens += work.prefill_tokens;
        counts.context_tokens += work.context_tokens;
        counts.prompt_tokens += work.prompt_tokens;
        counts.prompts += 1;
        drop(counts);
        Dispatch { load: self.clone(), work, has_first_token: false }
    }

    /// Takes in what the replica says; `None` once its last word is too old to be believed.
    pub fn report(&self, report: Option<Report>) {
        let mut counts = self.counts();
        let known = *counts;
        counts.reported = report.map(|report| Reported {
            kv_usage: if report.kv_usage.is_nan() { 0.0 } else { report.kv_usage.clamp(0.0, 1.0) },
            context_tokens: known.context_tokens,
            foreign_waiting: report.waiting.saturating_sub(known.prefilling),
            foreign_running: report.running.saturating_sub(known.decoding + known.prefilling),
        });
    }

    pub fn view(&self) -> LoadView {
        let counts = *self.counts();
        let (waiting, running) =
            counts.reported.map_or((0, 0), |reported| (reported.foreign_waiting, reported.foreign_running));
        let mean_prompt = counts.prompt_tokens.checked_div(counts.prompts).unwrap_or(0);
        LoadView {
            in_flight: counts.in_flight,
            requests: counts.in_flight + waiting + running,
            pending_prefill_tokens: counts.pending_prefill_tokens + u64::from(waiting) * mean_prompt,
            decoding: counts.decoding + running,
            kv_usage: counts.kv_usage(),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Counts are numbers; none of them is half written when a thread panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    /// The reported share, moved by what was sent and what ended since.
    fn kv_usage(&self) -> f64 {
        let (base, then) =
            self.reported.map_or((0.0, 0), |reported| (reported.kv_usage, reported.context_tokens));
        if self.capacity_tokens == 0 {
            return base;
        }
        let moved = self.context_tokens as f64 - then as f64;
        (base + moved / self.capacity_tokens as f64).clamp(0.0, 1.0)
    }
}

/// One request at one replica, from the decision to the end of its answer. Dropping it takes the request out of the
/// counts, however it ended, so that no count can outlive its request and none is lost while it lives.
#[derive(Debug)]
pub struct Dispatch {
    load: Arc<Load>,
    work: Work,
    has_first_token: bool,
}

impl Dispatch {
    /// The prompt is computed: from now on the request decodes. Further calls do nothing.
    pub fn first_token(&mut self) {
        if !self.has_first_token {
            self.has_first_token = true;
            let mut counts = self.load.counts();
            counts.prefilling -= 1;
            counts.pending_prefill_tokens -= self.work.prefill_tokens;
            counts.decoding += self.work.sequences;
        }
    }

    /// Answers that it generates.
    pub fn sequences(&self) -> u32 {
        self.work.sequences
    }

    pub fn has_first_token(&self) -> bool {
        self.has_first_token
    }
}

impl Drop for Dispatch {
    fn drop(&mut self) {
        let mut counts = self.load.counts();
        counts.in_flight -= 1;
        counts.context_tokens -= self.work.context_tokens;
        if self.has_first_token {
            counts.decoding -= self.work.sequences;
        } else {
            counts.prefilling -= 1;
            counts.pending_prefill_tokens -= self.work.prefill_tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(prefill_tokens: u64) -> Work {
        Work { sequences: 1, prefill_tokens, prompt_tokens: 1000, context_tokens: 1100 }
    }

    #[test]
    fn a_request_moves_from_prefill_to_decode_to_nothing() {
        let load = Arc::new(Load::default());
        let mut dispatch = load.dispatch(Work { sequences: 3, ..work(600) });
        let other = load.dispatch(work(50));
        let view = load.view();
        assert_eq!((view.in_flight, view.pending_prefill_tokens, view.decoding), (2, 650, 0));
        dispatch.first_token();
        dispatch.first_token();
        let view = load.view();
        assert_eq!((view.in_flight, view.pending_prefill_tokens, view.decoding), (2, 50, 3));
        drop((dispatch, other));
        assert_eq!(load.view(), LoadView::default());
    }

    /// Fault 5 of the peers: counts in flight that leak, or that a reaper takes away from live requests.
    #[test]
    fn whatever_ends_a_request_ends_its_count() {
        let load = Arc::new(Load::default());
        let inner = load.clone();
        let panicked = std::thread::spawn(move || {
            let _dispatch = inner.dispatch(work(600));
            panic!("as a handler may");
        });
        assert!(panicked.join().is_err());
        let kept = load.dispatch(work(10));
        assert_eq!(load.view().in_flight, 1);
        drop(kept);
        assert_eq!(load.view(), LoadView::default());
    }

    #[test]
    fn a_report_adds_what_came_some_other_way() {
        let load = Arc::new(Load::default());
        let mut decoding = load.dispatch(work(600));
        decoding.first_token();
        let _waiting = load.dispatch(work(600));
        load.report(Some(Report { running: 1, waiting: 1, kv_usage: 0.0 }));
        assert_eq!(load.view().requests, 2, "these two are our own");
        load.report(Some(Report { running: 5, waiting: 3, kv_usage: 0.0 }));
        let view = load.view();
        assert_eq!((view.in_flight, view.requests), (2, 7));
        assert_eq!(
            view.pending_prefill_tokens,
            600 + 2 * 1000,
            "prompts of others are taken for average ones"
        );
        load.report(None);
        assert_eq!(load.view().requests, 2, "an old report is not believed");
    }

    #[test]
    fn the_reported_share_of_the_cache_moves_with_what_is_sent_and_ends() {
        let load = Arc::new(Load::default());
        load.set_capacity(11_000);
        let first = load.dispatch(work(600));
        assert!((load.view().kv_usage - 0.1).abs() < 1e-9);
        load.report(Some(Report { running: 9, waiting: 0, kv_usage: 0.85 }));
        let second = load.dispatch(work(600));
        assert!((load.view().kv_usage - 0.95).abs() < 1e-9);
        drop((first, second));
        assert!((load.view().kv_usage - 0.75).abs() < 1e-9);
        for (said, taken) in [(f64::NAN, 0.0), (-3.0, 0.0), (7.0, 1.0)] {
            load.report(Some(Report { running: 0, waiting: 0, kv_usage: said }));
            assert_eq!(load.view().kv_usage, taken);
        }
    }
}
