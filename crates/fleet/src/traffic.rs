//! When requests come, and what they ask.

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use servelab_bench::arrivals::{ArrivalShape, Stage};
use servelab_bench::prompt::{Content, Job, Pool, Writer, key};
use servelab_bench::result::Endpoint;
use servelab_engine::TokenId;

/// Who sends requests.
#[derive(Clone, Debug, PartialEq)]
pub enum Load {
    /// Requests come whatever becomes of them.
    Open(ArrivalShape),
    /// So many users, each of whom reads the answer for a while (exponential, with this mean) and asks again.
    Users { users: u32, think: Duration },
}

/// The rate of a day or another period: from a low at its beginning to `peak` times the mean in its middle and back,
/// along a cosine. `peak` is at most 2, where the low is nothing.
pub fn diurnal(mean_rate: f64, peak: f64, period_seconds: f64, seconds: f64) -> ArrivalShape {
    const STAGES_PER_PERIOD: f64 = 48.0;
    let stage = period_seconds / STAGES_PER_PERIOD;
    let rate = |at: f64| {
        let phase = std::f64::consts::TAU * at / period_seconds;
        (mean_rate * (1.0 - (peak - 1.0) * phase.cos())).max(0.0)
    };
    let stages = (0..(seconds / stage).ceil() as u32).map(|number| {
        let from = f64::from(number) * stage;
        Stage { seconds: stage, from_rate: rate(from), to_rate: rate(from + stage) }
    });
    ArrivalShape::Stages { stages: stages.collect(), burstiness: 1.0 }
}

/// A base rate, and in the third of the time after the first quarter `factor` times that.
pub fn spike(base_rate: f64, factor: f64, seconds: f64) -> ArrivalShape {
    let flat = |share: f64, rate| Stage { seconds: share * seconds, from_rate: rate, to_rate: rate };
    let peak = base_rate * factor;
    let stages = vec![flat(0.25, base_rate), flat(1.0 / 3.0, peak), flat(0.75 - 1.0 / 3.0, base_rate)];
    ArrivalShape::Stages { stages, burstiness: 1.0 }
}

/// From nothing for a while, to a rate, to nothing again: what a fleet that sleeps has to wake for.
pub fn from_zero(rate: f64, seconds: f64) -> ArrivalShape {
    let flat = |share: f64, rate| Stage { seconds: share * seconds, from_rate: rate, to_rate: rate };
    let stages = vec![flat(0.1, 0.0), flat(0.4, rate), flat(0.5, 0.0)];
    ArrivalShape::Stages { stages, burstiness: 1.0 }
}

/// In equal parts of the time, one rate after the other.
pub fn steps(rates: &[f64], seconds: f64) -> ArrivalShape {
    let each = seconds / rates.len().max(1) as f64;
    let stage = |rate: &f64| Stage { seconds: each, from_rate: *rate, to_rate: *rate };
    ArrivalShape::Stages { stages: rates.iter().map(stage).collect(), burstiness: 1.0 }
}

/// A job, how far it is, and whose it is.
#[derive(Clone, Debug)]
pub struct Conversation {
    pub number: u64,
    job: Job,
    turn: usize,
    /// All tokens so far, answers included.
    pub history: Vec<TokenId>,
}

impl Conversation {
    pub fn new(number: u64, job: Job) -> Self {
        Self { number, job, turn: 0, history: Vec::new() }
    }

    /// Adds what the turn says, and returns how long its answer is to be.
    pub fn say(&mut self, writer: &Writer) -> u32 {
        let turn = &self.job.turns[self.turn];
        if let Content::Random(segments) = &turn.content {
            self.history.extend(writer.ids(segments));
        }
        turn.output_tokens.max(1)
    }

    /// Goes on to the next turn, and returns how long after the answer it is said. `None` if there is none.
    pub fn next_turn(&mut self) -> Option<Duration> {
        self.turn += 1;
        self.job.turns.get(self.turn).map(|turn| turn.think)
    }

    /// Of several turns: a name for the router.
    pub fn session(&self) -> Option<u64> {
        (self.job.turns.len() > 1).then(|| servelab_bench::prompt::mix(self.number))
    }
}

/// Turns stretches of streams into token ids.
pub fn writer(seed: u64) -> Writer {
    /// Enough that no two blocks are alike by chance, and few enough to stay in the nearest cache.
    const VOCABULARY: u32 = 4096;
    Writer {
        endpoint: Endpoint::Completions,
        model: String::new(),
        pool: Pool::Ids((0..VOCABULARY).collect()),
        key: key(seed, 0),
        salt_text: None,
        ignore_eos: true,
        temperature: None,
        extra_body: serde_json::Map::new(),
    }
}

/// Random numbers of the simulation that belong to no other part. Each use has its stream.
pub fn random(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// An exponential time of that mean.
pub fn exponential(random: &mut ChaCha8Rng, mean: Duration) -> Duration {
    mean.mul_f64(-(1.0 - random.random::<f64>()).ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(shape: &ArrivalShape, from: f64, to: f64) -> usize {
        shape.times(3).map(|at| at.as_secs_f64()).filter(|at| (from..to).contains(at)).count()
    }

    #[test]
    fn a_day_has_a_low_and_a_peak() {
        let day = diurnal(2.0, 1.8, 86_400.0, 86_400.0);
        assert!((day.mean_rate().unwrap() - 2.0).abs() < 0.02);
        let (night, noon) = (count(&day, 0.0, 3600.0), count(&day, 41_400.0, 45_000.0));
        assert!(night < 2000 && (12_000..14_000).contains(&noon), "{night} at night, {noon} at noon");
    }

    #[test]
    fn a_spike_is_as_high_as_asked() {
        let shape = spike(5.0, 10.0, 1200.0);
        assert!(shape.validate().is_ok());
        let (before, within) = (count(&shape, 0.0, 300.0), count(&shape, 300.0, 600.0));
        let factor = within as f64 / before as f64;
        assert!((9.0..11.0).contains(&factor), "{factor}");
        assert_eq!(count(&from_zero(5.0, 100.0), 0.0, 10.0), 0);
    }
}
