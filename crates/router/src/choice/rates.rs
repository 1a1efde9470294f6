//! How fast one replica works, learnt from its own counters: prompt tokens a second, seconds a decode step, and how
//! much of a step each sequence in it takes.
//!
//! Two estimates of the first, of which the larger holds. Tokens over the prefill times of their requests is right
//! where prompts are computed one after the other, and too low where several share a step, since each then counts the
//! whole step. Tokens over the time on the clock is what was achieved, and too low where the replica had nothing to
//! do. The last comes from the shortest step seen, which is that of an idle replica sooner or later: what a step takes
//! beyond it, without the prompts that were computed in between, shared out among its sequences.
//!
//! Replicas of one kind seem to differ, by what they happened to compute. A cost that believed it would crowd those
//! that look fast, so a replica counts as different from the mean only by what goes beyond a factor of [`ALIKE`].

use std::time::Duration;

/// Counters of one replica since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    /// The caller's clock when they were read.
    pub at: Duration,
    /// `prompt_tokens_total` less `prompt_tokens_cached_total`.
    pub computed_prompt_tokens: f64,
    /// Sum of `request_prefill_time_seconds`.
    pub prefill_seconds: f64,
    /// Sum and count of `inter_token_latency_seconds`.
    pub token_gap_seconds: f64,
    pub token_gaps: f64,
}

/// The speed of one replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    pub prefill_tokens_per_second: f64,
    /// Mean time between two tokens of a sequence.
    pub step_seconds: f64,
    /// How much longer a step takes for each sequence in it.
    pub sequence_seconds: f64,
}

impl Default for Pace {
    /// Of a model of some 8 billion parameters on one large GPU: a guess until something is measured.
    fn default() -> Self {
        Self { prefill_tokens_per_second: 20_000.0, step_seconds: 0.015, sequence_seconds: 0.0001 }
    }
}

/// Weight of the latest window in the mean.
const LATEST: f64 = 0.3;
/// A window ends when this much has happened in it; less is noise.
const WINDOW_TOKENS: f64 = 512.0;
const WINDOW_GAPS: f64 = 64.0;
/// Replicas whose paces differ by no more than this factor are taken to be of one kind.
const ALIKE: f64 = 1.3;

/// Learns the pace of one replica.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    prefill_from: Option<Counters>,
    gaps_from: Option<Counters>,
    prefill_tokens_per_second: Option<f64>,
    /// The largest of all windows.
    most_prefill_tokens_per_second: Option<f64>,
    step_seconds: Option<f64>,
    /// The same without the prompts that were computed in between.
    decode_seconds: Option<f64>,
    /// The least of all windows.
    shortest_step_seconds: Option<f64>,
    /// Sequences in a step.
    sequences: Option<f64>,
}

impl Rates {
    /// Takes in the counters as they are now, and the number of sequences that decode.
    pub fn observe(&mut self, now: Counters, decoding: u32) {
        self.prefill_from = match self.prefill_from {
            Some(from) if !restarted(from, now) => match prefill_rate(from, now) {
                Some(rate) => {
                    learn(&mut self.prefill_tokens_per_second, rate);
                    let most = &mut self.most_prefill_tokens_per_second;
                    *most = Some(most.map_or(rate, |most| most.max(rate)));
                    Some(now)
                }
                None => Some(window_start(from, now)),
            },
            _ => Some(now),
        };
        self.gaps_from = match self.gaps_from {
            Some(from) if !restarted(from, now) => {
                let gaps = now.token_gaps - from.token_gaps;
                if gaps >= WINDOW_GAPS {
                    self.learn_step(from, now, decoding);
                    Some(now)
                } else {
                    Some(from)
                }
            }
            _ => Some(now),
        };
    }

    fn learn_step(&mut self, from: Counters, now: Counters, decoding: u32) {
        let seconds = (now.token_gap_seconds - from.token_gap_seconds) / (now.token_gaps - from.token_gaps);
        let passed = now.at.saturating_sub(from.at).as_secs_f64();
        let prompt_tokens = now.computed_prompt_tokens - from.computed_prompt_tokens;
        let prefill_seconds = self
            .most_prefill_tokens_per_second
            .map_or(0.0, |tokens_per_second| prompt_tokens / tokens_per_second);
        learn(&mut self.step_seconds, seconds);
        learn(&mut self.decode_seconds, seconds * (1.0 - (prefill_seconds / passed).clamp(0.0, 1.0)));
        learn(&mut self.sequences, f64::from(decoding.max(1)));
        if seconds.is_finite() && seconds > 0.0 {
            let shortest = &mut self.shortest_step_seconds;
            *shortest = Some(shortest.map_or(seconds, |least| least.min(seconds)));
        }
    }

    /// What was learnt, as far as it differs from the fleet's `mean` by more than chance; that where nothing was yet.
    pub fn pace(&self, mean: Pace) -> Pace {
        let prefill = self.prefill_tokens_per_second.unwrap_or(mean.prefill_tokens_per_second);
        let step = self.step_seconds.unwrap_or(mean.step_seconds);
        let step_seconds = apart(step, mean.step_seconds);
        Pace {
            prefill_tokens_per_second: apart(prefill, mean.prefill_tokens_per_second),
            step_seconds,
            // A slower kind of replica is slower for each of its sequences.
            sequence_seconds: mean.sequence_seconds * (step_seconds / mean.step_seconds),
        }
    }

    /// The mean over those replicas of which something is known, else `prior`.
    pub fn mean<'a>(all: impl Iterator<Item = &'a Self> + Clone, prior: Pace) -> Pace {
        let mean = |values: &mut dyn Iterator<Item = f64>, prior: f64| {
            let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
            if count == 0 { prior } else { sum / f64::from(count) }
        };
        let rates = &mut all.clone().filter_map(|rates| rates.prefill_tokens_per_second);
        let steps = &mut all.clone().filter_map(|rates| rates.step_seconds);
        let (beyond, sequences) = all.filter_map(Self::beyond_the_shortest).fold((0.0, 0.0), sum_of_pairs);
        Pace {
            prefill_tokens_per_second: mean(rates, prior.prefill_tokens_per_second),
            step_seconds: mean(steps, prior.step_seconds),
            sequence_seconds: if sequences > 0.0 { beyond / sequences } else { prior.sequence_seconds },
        }
    }

    /// What a step takes beyond the shortest one, in seconds, and how many sequences are in it.
    fn beyond_the_shortest(&self) -> Option<(f64, f64)> {
        Some(((self.decode_seconds? - self.shortest_step_seconds?).max(0.0), self.sequences?))
    }
}

fn sum_of_pairs(one: (f64, f64), other: (f64, f64)) -> (f64, f64) {
    (one.0 + other.0, one.1 + other.1)
}

/// The mean, moved by as much as `own` is beyond [`ALIKE`] times or below an [`ALIKE`]th of it.
fn apart(own: f64, mean: f64) -> f64 {
    if own > mean * ALIKE {
        own / ALIKE
    } else if own * ALIKE < mean {
        own * ALIKE
    } else {
        mean
    }
}

/// `None` while too little has happened.
fn prefill_rate(from: Counters, now: Counters) -> Option<f64> {
    let tokens = now.computed_prompt_tokens - from.computed_prompt_tokens;
    let busy = now.prefill_seconds - from.prefill_seconds;
    let passed = now.at.saturating_sub(from.at).as_secs_f64();
    let seconds = busy.min(passed);
    (tokens >= WINDOW_TOKENS && seconds > 0.0).then(|| tokens / seconds)
}

/// Idle time before the first token of a window belongs to no window.
fn window_start(from: Counters, now: Counters) -> Counters {
    if now.computed_prompt_tokens == from.computed_prompt_tokens { now } else { from }
}

/// Counters only grow, unless the replica was started anew.
fn restarted(from: Counters, now: Counters) -> bool {
    now.computed_prompt_tokens < from.computed_prompt_tokens
        || now.prefill_seconds < from.prefill_seconds
        || now.token_gaps < from.token_gaps
}

fn learn(mean: &mut Option<f64>, value: f64) {
    if value.is_finite() && value > 0.0 {
        *mean = Some(mean.map_or(value, |mean| mean + LATEST * (value - mean)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(at: f64, tokens: f64, prefill_seconds: f64) -> Counters {
        Counters {
            at: Duration::from_secs_f64(at),
            computed_prompt_tokens: tokens,
            prefill_seconds,
            ..Counters::default()
        }
    }

    fn prefill(observed: &[Counters]) -> f64 {
        let mut rates = Rates::default();
        observed.iter().for_each(|counters| rates.observe(*counters, 1));
        rates.prefill_tokens_per_second.unwrap_or(-1.0)
    }

    #[test]
    fn prompts_one_after_the_other_and_prompts_in_one_step_give_the_same_rate() {
        assert_eq!(prefill(&[counters(0.0, 0.0, 0.0), counters(9.0, 10_000.0, 2.0)]), 5000.0);
        // Ten prompts of 1,000 tokens share two seconds of steps: each of them waited for both.
        assert_eq!(prefill(&[counters(0.0, 0.0, 0.0), counters(2.0, 10_000.0, 20.0)]), 5000.0);
    }

    #[test]
    fn an_idle_replica_is_not_a_slow_one() {
        let idle = counters(1000.0, 0.0, 0.0);
        assert_eq!(prefill(&[counters(0.0, 0.0, 0.0), idle, counters(1002.0, 10_000.0, 20.0)]), 5000.0);
    }

    #[test]
    fn little_is_not_enough_and_a_restart_is_no_rate() {
        assert_eq!(prefill(&[counters(0.0, 0.0, 0.0), counters(1.0, 100.0, 1.0)]), -1.0);
        assert_eq!(prefill(&[counters(0.0, 90_000.0, 9.0), counters(1.0, 1000.0, 1.0)]), -1.0);
        let again = [counters(0.0, 90_000.0, 9.0), counters(1.0, 0.0, 0.0), counters(2.0, 1000.0, 0.5)];
        assert_eq!(prefill(&again), 2000.0);
    }

    #[test]
    fn steps_are_the_mean_gap_and_the_newest_window_counts_most() {
        let gaps = |at: f64, seconds: f64, gaps: f64| Counters {
            at: Duration::from_secs_f64(at),
            token_gap_seconds: seconds,
            token_gaps: gaps,
            ..Counters::default()
        };
        let mut rates = Rates::default();
        let observed =
            [gaps(0.0, 0.0, 0.0), gaps(1.0, 1.0, 100.0), gaps(2.0, 1.1, 105.0), gaps(3.0, 3.0, 200.0)];
        let decoding = [0, 2, 3, 12];
        observed.into_iter().zip(decoding).for_each(|(counters, decoding)| rates.observe(counters, decoding));
        let mean = Rates::mean([rates].iter(), Pace::default());
        assert!((mean.step_seconds - 0.013).abs() < 1e-9, "{mean:?}");
        // Five sequences on average, 3 ms beyond the shortest step.
        assert!((mean.sequence_seconds - 0.003 / 5.0).abs() < 1e-9, "{mean:?}");
    }

    #[test]
    fn a_replica_is_different_only_by_what_is_beyond_chance() {
        let rate = |own: f64| {
            let rates = Rates { prefill_tokens_per_second: Some(own), ..Rates::default() };
            rates
                .pace(Pace { prefill_tokens_per_second: 1000.0, ..Pace::default() })
                .prefill_tokens_per_second
        };
        for (own, expected) in [(800.0, 1000.0), (1299.0, 1000.0), (2600.0, 2000.0), (130.0, 169.0)] {
            assert!((rate(own) - expected).abs() < 1e-9, "{own}: {}", rate(own));
        }
        let slow = Rates { step_seconds: Some(0.039), ..Rates::default() };
        let mean = Pace { step_seconds: 0.015, sequence_seconds: 0.0002, ..Pace::default() };
        assert!(
            (slow.pace(mean).sequence_seconds - 0.0004).abs() < 1e-12,
            "twice the step, twice the sequence"
        );
    }

    #[test]
    fn a_newcomer_is_expected_to_be_like_the_others() {
        let known = |rate: f64| Rates { prefill_tokens_per_second: Some(rate), ..Rates::default() };
        let fleet = [known(1000.0), known(3000.0), Rates::default()];
        let mean = Rates::mean(fleet.iter(), Pace::default());
        assert_eq!(mean, Pace { prefill_tokens_per_second: 2000.0, ..Pace::default() });
        assert_eq!(Rates::mean([].iter(), Pace::default()), Pace::default());
    }
}
