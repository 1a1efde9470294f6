//! The generators of jobs. Each is an iterator that depends on nothing but its settings and its seed.

use std::io::BufRead;
use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::WorkloadError;
use super::lengths::{Lengths, MAX_TOKENS, Span, Strata};
use super::trace::lines;
use super::tree::{Paths, PrefixTree};
use crate::phases::MAX_REQUESTS;
use crate::prompt::{Content, Job, Segment, Turn};

/// Streams below are prefixes; those above belong to requests.
const OWN_STREAMS: u64 = 1 << 32;

impl From<Span> for Lengths {
    fn from(span: Span) -> Self {
        Self::Uniform(span)
    }
}

/// Requests that share nothing, or what a tree of prefixes says.
pub struct Independent {
    input: Lengths,
    output: Lengths,
    input_shares: Strata,
    output_shares: Strata,
    paths: Option<Paths>,
    next: u64,
}

impl Independent {
    pub fn new(input: Lengths, output: Lengths, tree: Option<PrefixTree>, seed: u64) -> Self {
        let paths = tree.map(|tree| Paths::new(tree, seed));
        let (input_shares, output_shares) = (Strata::new(seed, 1), Strata::new(seed, 2));
        Self { input, output, input_shares, output_shares, paths, next: 0 }
    }
}

impl Iterator for Independent {
    type Item = Job;

    fn next(&mut self) -> Option<Job> {
        let input = self.input.at(self.input_shares.share());
        let output = self.output.at(self.output_shares.share());
        let segments = match &mut self.paths {
            Some(paths) => paths.next(input),
            None => vec![Segment::of(OWN_STREAMS + self.next, input)],
        };
        self.next += 1;
        Some(Job::single(Content::Random(segments), output))
    }
}

/// Requests that begin with one of a few prefixes, each as likely as the others.
pub struct SharedPrefixes {
    prefixes: u32,
    prefix_tokens: u32,
    own: Independent,
    random: ChaCha8Rng,
}

impl SharedPrefixes {
    pub fn new(prefixes: u32, prefix_tokens: u32, input: Lengths, output: Lengths, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(3);
        Self { prefixes, prefix_tokens, own: Independent::new(input, output, None, seed), random }
    }
}

impl Iterator for SharedPrefixes {
    type Item = Job;

    fn next(&mut self) -> Option<Job> {
        let mut job = self.own.next()?;
        let prefix = Segment::of(u64::from(self.random.random_range(0..self.prefixes)), self.prefix_tokens);
        if let Content::Random(segments) = &mut job.turns[0].content {
            segments.insert(0, prefix);
        }
        Some(job)
    }
}

/// Conversations of several turns behind one system prompt.
pub struct Conversations {
    turns: Lengths,
    turn_shares: Strata,
    prefix_tokens: u32,
    think: Duration,
    own: Independent,
}

impl Conversations {
    /// `lengths`: turns of a conversation, and tokens of a turn's input and output.
    pub fn new(lengths: (Lengths, Lengths, Lengths), prefix_tokens: u32, think: Duration, seed: u64) -> Self {
        let (turns, input, output) = lengths;
        let own = Independent::new(input, output, None, seed);
        Self { turns, turn_shares: Strata::new(seed, 4), prefix_tokens, think, own }
    }
}

impl Iterator for Conversations {
    type Item = Job;

    fn next(&mut self) -> Option<Job> {
        let count = self.turns.at(self.turn_shares.share());
        let mut turns: Vec<Turn> = self.own.by_ref().take(count as usize).flat_map(|job| job.turns).collect();
        for (at, turn) in turns.iter_mut().enumerate() {
            match &mut turn.content {
                Content::Random(segments) if at == 0 && self.prefix_tokens > 0 => {
                    segments.insert(0, Segment::of(0, self.prefix_tokens));
                }
                _ => turn.think = self.think,
            }
        }
        Some(Job { turns })
    }
}

/// A line of a file of prompts, where it is JSON.
#[derive(Deserialize)]
struct Line {
    prompt: String,
    output_tokens: Option<u32>,
}

/// The prompts of a file: one a line, or JSON lines with `prompt` and, if wanted, `output_tokens`.
///
/// # Errors
/// The first line that cannot be used.
pub fn given(file: impl BufRead, name: &str, output_tokens: u32) -> Result<Vec<Job>, WorkloadError> {
    let mut jobs = Vec::new();
    for (at, line) in lines(file, name).enumerate() {
        let line = line?;
        let text = line.trim_end_matches(['\r', '\n']);
        if text.trim().is_empty() {
            continue;
        }
        let (prompt, output) = if text.starts_with('{') {
            let line: Line = serde_json::from_str(text)
                .map_err(|_| WorkloadError::line(name, at, "no JSON object with the field prompt".into()))?;
            (line.prompt, line.output_tokens.unwrap_or(output_tokens))
        } else {
            (text.to_owned(), output_tokens)
        };
        if !(1..=MAX_TOKENS).contains(&output) {
            let reason = format!("output_tokens {output} is out of range; 1 to {MAX_TOKENS} are allowed");
            return Err(WorkloadError::line(name, at, reason));
        }
        jobs.push(Job::single(Content::Given(Arc::from(prompt)), output));
        if jobs.len() as u64 > MAX_REQUESTS {
            return Err(WorkloadError::line(name, at, format!("more than {MAX_REQUESTS} prompts")));
        }
    }
    if jobs.is_empty() {
        return Err(WorkloadError::line(name, 0, "the file has no prompts".into()));
    }
    Ok(jobs)
}
