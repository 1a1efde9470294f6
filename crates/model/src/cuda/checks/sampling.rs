//! The sampling kernel against the CPU's sampler: the same tokens, ranks and alternatives.

use std::sync::Arc;

use servelab_engine::{Draw, History, LogitsRow, RowOutput, RunnerError, SamplingParams, SequenceId, Want};

use super::{Check, Checker, Report, Shape, Size};
use crate::cpu::random::Random;
use crate::cuda::draws::{DrawWords, Draws, LOGPROB_WORDS, read_answer};
use crate::cuda::gpu::{Gpu, GpuError, Memory};
use crate::cuda::kernels::{Element, KvElement};
use crate::cuda::launch::{Kernels, Sample};
use crate::sampler::Sampler;

const PLAIN: Shape =
    Shape { element: Element::BF16, kv: KvElement::Same, head_dim: 64, group: 1, block_size: 16 };

/// Rows of several kinds, each with draws of every kind.
///
/// # Errors
/// What the GPU fails with.
pub fn sampling<G: Gpu>(gpu: &G, size: Size, report: Report<'_>) -> Result<(), GpuError> {
    let checker = Checker::new(gpu, size)?;
    let kernels = Kernels::load(gpu, checker.specialisation(PLAIN))?;
    let vocabularies: &[usize] = match size {
        Size::Small => &[1, 3, 50, 1003],
        Size::Full => &[1, 3, 1003, 20_000, 50_257, 151_936],
    };
    for vocabulary in vocabularies {
        for kind in [Logits::Usual, Logits::Coarse, Logits::Flat, Logits::Extreme] {
            report(checker.sample(&kernels, *vocabulary, kind)?);
        }
        report(checker.broken_rows(&kernels, *vocabulary)?);
    }
    if size == Size::Small {
        // Long enough that every thread goes round more than once.
        report(checker.sample(&kernels, 20_000, Logits::Usual)?);
    }
    if size == Size::Full {
        for (name, params) in timed() {
            report(checker.time_sampling(&kernels, name, params)?);
        }
    }
    Ok(())
}

/// How logits are distributed.
#[derive(Clone, Copy, Debug)]
enum Logits {
    /// As models make them: a few likely tokens and a long tail.
    Usual,
    /// Few different values, so that equal ones decide by the token's id.
    Coarse,
    /// All equal: nothing tells the tokens apart but their ids.
    Flat,
    /// Up to the ends of f32, and zeros of both signs.
    Extreme,
}

impl Logits {
    fn row(self, random: &mut Random, vocabulary: usize) -> Vec<f32> {
        let mut logit = || match self {
            Self::Usual => random.value() * 4.0 + random.value() * random.value() * 12.0,
            Self::Coarse => (random.value() * 6.0).round() / 2.0,
            Self::Flat => 0.25,
            Self::Extreme => match random.next() % 8 {
                0 => 3e38,
                1 => -3e38,
                2 => f32::NEG_INFINITY,
                3 => 0.0,
                4 => -0.0,
                _ => random.value() * 100.0,
            },
        };
        let mut row: Vec<f32> = (0..vocabulary).map(|_| logit()).collect();
        // A row of nothing but minus infinity is an error of its own.
        row[0] = if row[0] == f32::NEG_INFINITY { 0.0 } else { row[0] };
        row
    }
}

/// A draw or score with random settings; every feature alone and together with others.
fn random_want(random: &mut Random, vocabulary: usize, index: usize) -> Want {
    let token = |random: &mut Random| (random.next() % (vocabulary as u64 + 2)) as u32;
    let often = |random: &mut Random, of: u64| random.next().is_multiple_of(of);
    if index % 8 == 7 {
        let target = (random.next() % vocabulary as u64) as u32;
        return Want::Score { target, top: (random.next() % 21) as u32 };
    }
    let mut params = SamplingParams {
        temperature: [0.0, 1.0, 0.7, 1.6, 0.05][(random.next() % 5) as usize],
        seed: random.next(),
        ..SamplingParams::greedy()
    };
    if often(random, 2) {
        params.top_k = Some([1, 2, 20, 64, 5000][(random.next() % 5) as usize]);
    }
    if often(random, 2) {
        params.top_p = [0.9, 0.5, 0.99, 1e-6][(random.next() % 4) as usize];
    }
    if often(random, 3) {
        params.min_p = [0.05, 0.5, 1.0][(random.next() % 3) as usize];
    }
    if often(random, 3) {
        params.logprobs = Some((random.next() % 21) as u32);
    }
    if often(random, 3) {
        params.repetition_penalty = 1.3;
        params.frequency_penalty = 0.4;
        params.presence_penalty = -0.2;
    }
    if often(random, 3) {
        let first = token(random);
        params.logit_bias = (0..3).map(|i| (first + i, random.value() * 5.0)).collect();
    }
    let banned: Vec<u32> = if often(random, 4) && vocabulary > 8 { vec![token(random), 1] } else { vec![] };
    let history = params.needs_history().then(|| History {
        prompt: (0..20).map(|_| token(random)).collect(),
        output: (0..20).map(|_| token(random) % 5).collect(),
    });
    Want::Sample(Draw {
        sampling: Arc::new(params),
        choice: (random.next() % 3) as u32,
        output_index: (random.next() % 100) as u32,
        banned: banned.into(),
        history,
    })
}

fn wish(row: usize, want: Want) -> LogitsRow {
    LogitsRow { row, sequence: SequenceId(1), want }
}

/// What a launch is given, on the device.
struct Launched<M> {
    chosen: M,
    statuses: M,
    logprobs: M,
    scratch: M,
    words: M,
    changes: M,
}

impl<G: Gpu> Checker<'_, G> {
    fn sample(&self, kernels: &Kernels<G>, vocabulary: usize, kind: Logits) -> Result<Check, GpuError> {
        const ROWS: usize = 4;
        let wishes_per_row = match self.size {
            Size::Small => 12,
            Size::Full => 64,
        };
        let mut random = Random::new(vocabulary as u64);
        let rows: Vec<Vec<f32>> = (0..ROWS).map(|_| kind.row(&mut random, vocabulary)).collect();
        let wishes: Vec<LogitsRow> = (0..ROWS * wishes_per_row)
            .map(|index| wish(index % ROWS, random_want(&mut random, vocabulary, index)))
            .collect();
        let logits = self.upload(&rows.concat())?;
        let mut draws = Draws::default();
        // A padded answer must stay untouched.
        draws.draws.push(DrawWords::padding());
        for wish in &wishes {
            draws.push(wish.row, wish).map_err(refused)?;
        }
        let launched = self.place_draws(&draws, vocabulary)?;
        let call = call(&launched, &draws, logits.span(), ROWS, vocabulary);
        kernels.sample(self.gpu, &self.stream, call)?;
        let found = self.answers(&launched, &draws, vocabulary)?;
        let padding: Vec<u32> = self.download(launched.chosen.span().part(0..4))?;
        let mut sampler = Sampler::default();
        let answers: Vec<_> = wishes.iter().map(|wish| sampler.answer(&rows[wish.row], wish)).collect();
        let disagreement = wishes
            .iter()
            .zip(found[1..].iter().zip(&answers))
            .map(|(wish, (found, wanted))| answer_error(found, wanted, wish))
            .fold(if padding == [u32::MAX] { 0.0 } else { f64::INFINITY }, f64::max);
        Ok(Check {
            kernel: "sample_rows",
            case: format!("{kind:?} logits, vocabulary {vocabulary}, {} answers", wishes.len()),
            error: disagreement,
            tolerance: 1e-5,
            bytes: (ROWS * vocabulary * 4) as u64,
            flops: 0,
            seconds: None,
        })
    }

    /// Rows that have no answer say so, and nothing else does.
    fn broken_rows(&self, kernels: &Kernels<G>, vocabulary: usize) -> Result<Check, GpuError> {
        let good = Logits::Usual.row(&mut Random::new(5), vocabulary);
        let with = |value: f32| {
            let mut row = good.clone();
            row[vocabulary / 2] = value;
            row
        };
        let rows = [good.clone(), with(f32::NAN), with(f32::INFINITY), vec![f32::NEG_INFINITY; vocabulary]];
        let sampled = SamplingParams { temperature: 1.0, top_p: 0.5, ..SamplingParams::greedy() };
        let banned: Arc<[u32]> = (0..vocabulary as u32).collect();
        let draw = |banned: Arc<[u32]>| {
            let sampling = Arc::new(sampled.clone());
            Want::Sample(Draw { sampling, choice: 0, output_index: 0, banned, history: None })
        };
        let mut wishes: Vec<_> = (0..rows.len()).map(|row| wish(row, draw([].into()))).collect();
        wishes.push(wish(0, draw(banned)));
        wishes.push(wish(0, Want::Score { target: vocabulary as u32, top: 0 }));
        let mut draws = Draws::default();
        for wish in &wishes {
            draws.push(wish.row, wish).map_err(refused)?;
        }
        let logits = self.upload(&rows.concat())?;
        let launched = self.place_draws(&draws, vocabulary)?;
        let call = call(&launched, &draws, logits.span(), rows.len(), vocabulary);
        kernels.sample(self.gpu, &self.stream, call)?;
        let found = self.answers(&launched, &draws, vocabulary)?;
        let mut sampler = Sampler::default();
        let agree = wishes
            .iter()
            .zip(&found)
            .all(|(wish, found)| sampler.answer(&rows[wish.row], wish).is_err() == found.is_err());
        Ok(Check {
            kernel: "sample_rows",
            case: format!("rows without an answer, vocabulary {vocabulary}"),
            error: super::numbers::exactly(
                agree && found[0].is_ok() && found[1..].iter().all(Result::is_err),
            ),
            tolerance: 0.0,
            bytes: 0,
            flops: 0,
            seconds: None,
        })
    }

    fn time_sampling(
        &self,
        kernels: &Kernels<G>,
        name: &str,
        params: SamplingParams,
    ) -> Result<Check, GpuError> {
        const ROWS: usize = 64;
        const VOCABULARY: usize = 128_256;
        let mut random = Random::new(9);
        let rows: Vec<Vec<f32>> = (0..ROWS).map(|_| Logits::Usual.row(&mut random, VOCABULARY)).collect();
        let mut draws = Draws::default();
        let sampling = Arc::new(params);
        for (row, _) in rows.iter().enumerate() {
            let sampling = Arc::clone(&sampling);
            let draw = Draw { sampling, choice: 0, output_index: 0, banned: [].into(), history: None };
            draws.push(row, &wish(row, Want::Sample(draw))).map_err(refused)?;
        }
        let logits = self.upload(&rows.concat())?;
        let launched = self.place_draws(&draws, VOCABULARY)?;
        let call = call(&launched, &draws, logits.span(), ROWS, VOCABULARY);
        let seconds = self.run(|| kernels.sample(self.gpu, &self.stream, call))?;
        let found = self.answers(&launched, &draws, VOCABULARY)?;
        Ok(Check {
            kernel: "sample_rows",
            case: format!("{name}, {ROWS} rows of {VOCABULARY}"),
            error: super::numbers::exactly(found.iter().all(Result::is_ok)),
            tolerance: 0.0,
            bytes: (ROWS * VOCABULARY * 4) as u64,
            flops: 0,
            seconds,
        })
    }

    fn place_draws(&self, draws: &Draws, vocabulary: usize) -> Result<Launched<G::Memory>, GpuError> {
        let answers = draws.draws.len();
        Ok(Launched {
            chosen: self.poisoned(answers * 4)?,
            statuses: self.poisoned(answers * 4)?,
            logprobs: self.poisoned(answers * LOGPROB_WORDS * 4)?,
            scratch: self.poisoned(draws.scratch_rows as usize * vocabulary * 4)?,
            words: self.upload(&draws.draws)?,
            changes: self.upload(&draws.changes)?,
        })
    }

    fn answers(
        &self,
        launched: &Launched<G::Memory>,
        draws: &Draws,
        vocabulary: usize,
    ) -> Result<Vec<Result<RowOutput, RunnerError>>, GpuError> {
        let chosen: Vec<u32> = self.download(launched.chosen.span())?;
        let statuses: Vec<u32> = self.download(launched.statuses.span())?;
        let logprobs: Vec<f32> = self.download(launched.logprobs.span())?;
        let rows = logprobs.chunks_exact(LOGPROB_WORDS);
        let answers = draws.draws.iter().zip(chosen.iter().zip(&statuses)).zip(rows);
        let read = |((draw, (token, status)), words): ((&DrawWords, (&u32, &u32)), &[f32])| {
            read_answer(draw, *token, *status, words, vocabulary)
        };
        Ok(answers.map(read).collect())
    }
}

fn call<'a, M: Memory>(
    launched: &'a Launched<M>,
    draws: &Draws,
    logits: crate::cuda::gpu::Span<'a>,
    rows: usize,
    vocabulary: usize,
) -> Sample<'a> {
    Sample {
        chosen: launched.chosen.span(),
        statuses: launched.statuses.span(),
        logprobs: launched.logprobs.span(),
        logits,
        scratch: launched.scratch.span(),
        draws: launched.words.span(),
        changes: launched.changes.span(),
        answers: draws.draws.len(),
        rows,
        vocabulary,
        logits_stride: vocabulary,
        scratch_rows: draws.scratch_rows as usize,
        change_count: draws.changes.len(),
        any_logprobs: true,
    }
}

fn refused(error: RunnerError) -> GpuError {
    GpuError::Refused { what: "sampling".to_owned(), reason: error.to_string() }
}

/// 0 if two answers agree in everything but the rounding of log-probabilities, whose difference it is then.
fn answer_error(
    found: &Result<RowOutput, RunnerError>,
    wanted: &Result<RowOutput, RunnerError>,
    wish: &LogitsRow,
) -> f64 {
    let disagree = || {
        tracing::warn!(?wish, ?found, ?wanted, "the samplers disagree");
        f64::INFINITY
    };
    let (found, wanted) = match (found, wanted) {
        (Ok(found), Ok(wanted)) => (found, wanted),
        (Err(_), Err(_)) => return 0.0,
        _ => return disagree(),
    };
    if found.token != wanted.token {
        return disagree();
    }
    let (found, wanted) = match (&found.logprobs, &wanted.logprobs) {
        (None, None) => return 0.0,
        (Some(found), Some(wanted)) => (found, wanted),
        _ => return disagree(),
    };
    let ids = |top: &[(u32, f32)]| top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    if found.rank != wanted.rank || ids(&found.top) != ids(&wanted.top) {
        return disagree();
    }
    let pairs = found.top.iter().zip(&wanted.top).map(|((_, found), (_, wanted))| (*found, *wanted));
    let errors = pairs.chain([(found.logprob, wanted.logprob)]).map(|(found, wanted)| {
        if found == wanted { 0.0 } else { f64::from((found - wanted).abs() / wanted.abs().max(1.0)) }
    });
    errors.fold(0.0, |most, error| if error.is_nan() { f64::INFINITY } else { f64::max(most, error) })
}

/// The ways of sampling whose time is of interest.
fn timed() -> [(&'static str, SamplingParams); 4] {
    let sampled = SamplingParams { temperature: 0.8, seed: 1, ..SamplingParams::greedy() };
    [
        ("greedy", SamplingParams::greedy()),
        ("temperature", sampled.clone()),
        ("top_k and top_p", SamplingParams { top_k: Some(50), top_p: 0.95, ..sampled.clone() }),
        ("top_p and 20 log-probabilities", SamplingParams { top_p: 0.95, logprobs: Some(20), ..sampled }),
    ]
}
