//! What is asked of the server: prompts, lengths, shared prefixes, conversations.

pub mod catalogue;
mod generate;
pub mod lengths;
mod trace;
mod tree;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::arrivals::ArrivalShape;
use crate::prompt::{Content, Job, Segment};

use self::catalogue::{Catalogue, Comparison};
use self::generate::{Conversations, Independent, SharedPrefixes};
use self::lengths::Span;

/// The workloads that no data file describes.
const BUILT_IN: [(&str, &str); 3] = [
    ("random", "prompts that share nothing, of the lengths given with --input-tokens and --output-tokens"),
    ("multi-turn", "conversations: each turn repeats what was said before, answers included"),
    (
        "engine-comparison",
        "the 256 requests, all at once, that nano-vllm, mini-sglang and vllm.rs are compared with",
    ),
];

/// What the user chose; `None` is the workload's own default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkloadOptions {
    pub name: Option<String>,
    pub input: Option<Span>,
    pub output: Option<Span>,
    /// Prefixes to choose from, and how long they are.
    pub prefixes: Option<u32>,
    pub prefix_tokens: Option<u32>,
    /// Turns of a conversation.
    pub turns: Option<Span>,
    /// Between an answer and the next turn.
    pub turn_think_time: Option<Duration>,
    /// One prompt a line, or JSON lines with `prompt`.
    pub prompts_file: Option<PathBuf>,
    pub trace_file: Option<PathBuf>,
    /// How much faster than recorded a trace is replayed. Default 1.
    pub trace_speed: Option<f64>,
}

/// A workload that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    #[error("--workload {name:?} is unknown; there are {known}")]
    Unknown { name: String, known: String },
    #[error("--{option} does not go with the workload {workload}; leave it out, or use {instead}")]
    NotHere { option: &'static str, workload: String, instead: &'static str },
    #[error("--workload {name:?}, --prompts and --trace exclude each other; give one")]
    Several { name: String },
    #[error("--{option} is {value}; it must be {rule}")]
    Range { option: &'static str, value: String, rule: &'static str },
    #[error("cannot read {name}: {reason}")]
    Read { name: String, reason: String },
    #[error("{name}, line {line}: {reason}")]
    Line { name: String, line: usize, reason: String },
    #[error(
        "the workload {workload} has requests of up to {input} + {output} tokens, and the server's context is \
         {limit}; give --lengths clip or --lengths scale to make them fit, shorter lengths, or a longer \
         context (max_model_len)"
    )]
    TooLong { workload: String, input: u32, output: u32, limit: u32 },
}

impl WorkloadError {
    /// `at` counts from 0.
    fn line(name: &str, at: usize, reason: String) -> Self {
        Self::Line { name: name.to_owned(), line: at + 1, reason }
    }
}

/// What becomes of requests that are longer than the server's context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// The run is refused.
    #[default]
    Refuse,
    /// Too long ones are cut: the answer to half the context at most, the prompt to what is left.
    Clip,
    /// All lengths are multiplied with the factor that makes the longest fit.
    Scale,
}

type Jobs = Box<dyn Iterator<Item = Job> + Send>;

/// What is asked, and how its author would have it asked.
#[derive(Clone)]
pub struct Workload {
    pub name: String,
    pub description: String,
    /// As typed or by default, for the report.
    pub settings: BTreeMap<String, String>,
    /// Requests there are; `None`: as many as one likes.
    pub requests: Option<u64>,
    /// Longest prompt and longest answer; a conversation counts with all that comes before its last answer.
    pub most_input: u32,
    pub most_output: u32,
    /// How its requests arrive, where that belongs to it.
    pub arrivals: Option<ArrivalShape>,
    /// Whether answers are as long as asked, whatever the model would say.
    pub ignore_eos: bool,
    pub temperature: f64,
    /// All requests belong together: none is warm-up, and nothing keeps the load up behind them.
    pub is_whole: bool,
    /// Prompts must be text: a later turn repeats an answer, which comes as text, or the user wrote them.
    pub needs_text: bool,
    /// Whether prompts are the user's own.
    pub is_given: bool,
    jobs: Arc<dyn Fn(u64) -> Jobs + Send + Sync>,
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Workload")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Names and descriptions of all workloads.
pub fn list() -> Vec<(String, String)> {
    let catalogue = Catalogue::load();
    let built_in = BUILT_IN.iter().copied();
    let all = built_in.chain(catalogue.list());
    all.map(|(name, description)| (name.to_owned(), description.to_owned())).collect()
}

impl Workload {
    /// The workload with the options filled in. Reads files that are named.
    ///
    /// # Errors
    /// If there is no such workload, an option does not go with it, or a file cannot be used.
    pub fn new(options: &WorkloadOptions) -> Result<Self, WorkloadError> {
        let files = options.prompts_file.is_some() as u8 + options.trace_file.is_some() as u8;
        let name = options.name.clone().unwrap_or_else(|| "random".into());
        if files + u8::from(options.name.is_some()) > 1 {
            return Err(WorkloadError::Several { name });
        }
        if let Some(path) = &options.trace_file {
            return Self::trace(options, path);
        }
        if let Some(path) = &options.prompts_file {
            return Self::prompts(options, path);
        }
        let catalogue = Catalogue::load();
        match name.as_str() {
            "random" => Self::random(options),
            "multi-turn" => Self::multi_turn(options),
            "engine-comparison" => Self::comparison(options),
            other if catalogue.table(other).is_some() => Self::table(options, &catalogue, other),
            other if catalogue.prefixes(other).is_some() => Self::prefixes(options, &catalogue, other),
            _ => {
                let known: Vec<String> = list().into_iter().map(|(name, _)| name).collect();
                Err(WorkloadError::Unknown { name, known: known.join(", ") })
            }
        }
    }

    /// Its requests. The same seed gives the same lengths and the same sharing.
    pub fn jobs(&self, seed: u64) -> Jobs {
        (self.jobs)(seed)
    }

    /// The same workload within a context of `limit` tokens.
    ///
    /// # Errors
    /// If it does not fit and is not to be changed.
    pub fn within(mut self, limit: u32, fit: Fit) -> Result<Self, WorkloadError> {
        let longest = u64::from(self.most_input) + u64::from(self.most_output);
        if longest <= u64::from(limit) {
            return Ok(self);
        }
        let inner = self.jobs.clone();
        let change: fn(Job, u32, f64) -> Job = match fit {
            Fit::Refuse => {
                let (workload, input, output) = (self.name, self.most_input, self.most_output);
                return Err(WorkloadError::TooLong { workload, input, output, limit });
            }
            Fit::Clip => |job, limit, _| clip(job, limit),
            Fit::Scale => |job, _, factor| scale(job, factor),
        };
        let factor = f64::from(limit) / longest as f64;
        self.jobs = Arc::new(move |seed| Box::new(inner(seed).map(move |job| change(job, limit, factor))));
        let how =
            if fit == Fit::Clip { format!("clipped to {limit}") } else { format!("scaled by {factor:.4}") };
        self.settings.insert("lengths".into(), how);
        self.most_output = self.most_output.min(limit / 2);
        self.most_input = self.most_input.min(limit - self.most_output);
        Ok(self)
    }

    /// What is common to most: endless, independent, synthetic.
    fn synthetic(name: &str, description: &str, jobs: impl Fn(u64) -> Jobs + Send + Sync + 'static) -> Self {
        Self {
            name: name.into(),
            description: description.into(),
            settings: BTreeMap::new(),
            requests: None,
            most_input: 0,
            most_output: 0,
            arrivals: None,
            ignore_eos: true,
            temperature: 0.0,
            is_whole: false,
            needs_text: false,
            is_given: false,
            jobs: Arc::new(jobs),
        }
    }

    fn with(mut self, settings: &[(&str, String)], most_input: u32, most_output: u32) -> Self {
        self.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        (self.most_input, self.most_output) = (most_input, most_output);
        self
    }

    fn random(options: &WorkloadOptions) -> Result<Self, WorkloadError> {
        refuse(options, "random", &["input-tokens", "output-tokens"])?;
        let input = options.input.unwrap_or(Span::exactly(512));
        let output = options.output.unwrap_or(Span::exactly(128));
        let jobs = move |seed| Box::new(Independent::new(input.into(), output.into(), None, seed)) as Jobs;
        let settings = [("input_tokens", input.to_string()), ("output_tokens", output.to_string())];
        Ok(Self::synthetic("random", BUILT_IN[0].1, jobs).with(&settings, input.most, output.most))
    }

    fn table(options: &WorkloadOptions, catalogue: &Catalogue, name: &str) -> Result<Self, WorkloadError> {
        refuse(options, name, &[])?;
        let Some(table) = catalogue.table(name) else { return Self::random(options) };
        let (input, output) = (catalogue.input(table), catalogue.output(table));
        let (most_input, most_output) = (input.most(), output.most());
        let tree = table.prefixes.clone();
        let jobs =
            move |seed| Box::new(Independent::new(input.clone(), output.clone(), tree.clone(), seed)) as Jobs;
        let mut workload = Self::synthetic(name, &table.description, jobs).with(&[], most_input, most_output);
        workload.arrivals = Some(table.arrivals());
        Ok(workload)
    }

    fn prefixes(options: &WorkloadOptions, catalogue: &Catalogue, name: &str) -> Result<Self, WorkloadError> {
        refuse(options, name, &["input-tokens", "output-tokens", "prefixes", "prefix-tokens"])?;
        let Some(data) = catalogue.prefixes(name) else { return Self::random(options) };
        let prefixes = positive("prefixes", options.prefixes, data.prefixes)?;
        let prefix_tokens = positive("prefix-tokens", options.prefix_tokens, data.prefix_tokens)?;
        let input = options.input.unwrap_or(Span::exactly(data.input));
        let output = options.output.unwrap_or(Span::exactly(data.output));
        let jobs = move |seed| {
            Box::new(SharedPrefixes::new(prefixes, prefix_tokens, input.into(), output.into(), seed)) as Jobs
        };
        let settings = [
            ("prefixes", prefixes.to_string()),
            ("prefix_tokens", prefix_tokens.to_string()),
            ("input_tokens", input.to_string()),
            ("output_tokens", output.to_string()),
        ];
        let most_input = prefix_tokens.saturating_add(input.most);
        let mut workload =
            Self::synthetic(name, &data.description, jobs).with(&settings, most_input, output.most);
        workload.arrivals = Some(ArrivalShape::poisson(data.rate));
        Ok(workload)
    }

    fn multi_turn(options: &WorkloadOptions) -> Result<Self, WorkloadError> {
        let fitting = ["input-tokens", "output-tokens", "turns", "turn-think-time", "prefix-tokens"];
        refuse(options, "multi-turn", &fitting)?;
        let turns = options.turns.unwrap_or(Span { least: 2, most: 8 });
        let input = options.input.unwrap_or(Span { least: 32, most: 256 });
        let output = options.output.unwrap_or(Span { least: 64, most: 256 });
        let prefix_tokens = options.prefix_tokens.unwrap_or(256);
        let think = options.turn_think_time.unwrap_or_default();
        if turns.most > MAX_TURNS {
            let rule = "1 to 1000 turns";
            return Err(WorkloadError::Range { option: "turns", value: turns.to_string(), rule });
        }
        let jobs = move |seed| {
            let lengths = (turns.into(), input.into(), output.into());
            Box::new(Conversations::new(lengths, prefix_tokens, think, seed)) as Jobs
        };
        let settings = [
            ("turns", turns.to_string()),
            ("prefix_tokens", prefix_tokens.to_string()),
            ("input_tokens", input.to_string()),
            ("output_tokens", output.to_string()),
            ("turn_think_time_seconds", think.as_secs_f64().to_string()),
        ];
        let said = u64::from(turns.most) * u64::from(input.most)
            + u64::from(turns.most - 1) * u64::from(output.most);
        let most_input = u32::try_from(said + u64::from(prefix_tokens)).unwrap_or(u32::MAX);
        let mut workload =
            Self::synthetic("multi-turn", BUILT_IN[1].1, jobs).with(&settings, most_input, output.most);
        workload.needs_text = true;
        Ok(workload)
    }

    fn comparison(options: &WorkloadOptions) -> Result<Self, WorkloadError> {
        refuse(options, "engine-comparison", &[])?;
        let comparison = Comparison::load();
        let most = |lengths: &[u32]| lengths.iter().copied().max().unwrap_or(1);
        let (most_input, most_output) = (most(&comparison.input), most(&comparison.output));
        let (requests, temperature) = (comparison.input.len() as u64, comparison.temperature);
        let pairs: Arc<[(u32, u32)]> = comparison.input.into_iter().zip(comparison.output).collect();
        let jobs = move |_seed| {
            let pairs = pairs.clone();
            let job = move |at: usize| {
                let (input, output) = pairs[at];
                Job::single(Content::Random(vec![Segment::of(at as u64, input)]), output)
            };
            Box::new((0..requests as usize).map(job)) as Jobs
        };
        let mut workload =
            Self::synthetic("engine-comparison", BUILT_IN[2].1, jobs).with(&[], most_input, most_output);
        workload.arrivals = Some(ArrivalShape::AllAtOnce);
        (workload.requests, workload.is_whole, workload.temperature) = (Some(requests), true, temperature);
        Ok(workload)
    }

    fn trace(options: &WorkloadOptions, path: &Path) -> Result<Self, WorkloadError> {
        refuse(options, "trace", &["trace-speed"])?;
        let speed = options.trace_speed.unwrap_or(1.0);
        if !(speed > 0.0 && speed <= 1e6) {
            let (value, rule) = (speed.to_string(), "above 0 and at most 1000000");
            return Err(WorkloadError::Range { option: "trace-speed", value, rule });
        }
        let (file, name) = open(path)?;
        let trace = trace::read(file, &name)?;
        let times: Arc<[Duration]> = trace.times.iter().map(|time| time.div_f64(speed)).collect();
        let most = |of: fn(&Job) -> u32| trace.jobs.iter().map(of).max().unwrap_or(1);
        let most_input = most(|job| job.turns[0].content.tokens());
        let most_output = most(|job| job.turns[0].output_tokens);
        let settings = [("file", name), ("speed", speed.to_string())];
        let mut workload =
            Self::fixed("trace", "a trace, replayed", trace.jobs).with(&settings, most_input, most_output);
        workload.arrivals = Some(ArrivalShape::Trace { times });
        Ok(workload)
    }

    fn prompts(options: &WorkloadOptions, path: &Path) -> Result<Self, WorkloadError> {
        refuse(options, "prompts", &["output-tokens"])?;
        let output = options.output.unwrap_or(Span::exactly(128));
        let (file, name) = open(path)?;
        let jobs = generate::given(file, &name, output.most)?;
        let most_output = jobs.iter().map(|job| job.turns[0].output_tokens).max().unwrap_or(1);
        let settings = [("file", name), ("output_tokens", output.most.to_string())];
        // How long the prompts are, only the server knows.
        let mut workload =
            Self::fixed("prompts", "prompts from a file", jobs).with(&settings, 0, most_output);
        (workload.ignore_eos, workload.needs_text, workload.is_given) = (false, true, true);
        Ok(workload)
    }

    fn fixed(name: &str, description: &str, jobs: Vec<Job>) -> Self {
        let jobs: Arc<[Job]> = jobs.into();
        let requests = jobs.len() as u64;
        let all = move |_seed| {
            let jobs = jobs.clone();
            Box::new((0..jobs.len()).map(move |at| jobs[at].clone())) as Jobs
        };
        Self { requests: Some(requests), is_whole: true, ..Self::synthetic(name, description, all) }
    }
}

/// More would be no conversation.
const MAX_TURNS: u32 = 1000;

/// An option that a workload has no use for would be ignored.
fn refuse(options: &WorkloadOptions, workload: &str, fitting: &[&str]) -> Result<(), WorkloadError> {
    let given = [
        ("input-tokens", options.input.is_some(), "--workload random"),
        ("output-tokens", options.output.is_some(), "--workload random"),
        ("prefixes", options.prefixes.is_some(), "--workload shared-prefix"),
        ("prefix-tokens", options.prefix_tokens.is_some(), "--workload shared-prefix"),
        ("turns", options.turns.is_some(), "--workload multi-turn"),
        ("turn-think-time", options.turn_think_time.is_some(), "--workload multi-turn"),
        ("trace-speed", options.trace_speed.is_some(), "--trace"),
    ];
    match given.into_iter().find(|(option, given, _)| *given && !fitting.contains(option)) {
        None => Ok(()),
        Some((option, _, instead)) => {
            Err(WorkloadError::NotHere { option, workload: workload.to_owned(), instead })
        }
    }
}

fn positive(option: &'static str, given: Option<u32>, default: u32) -> Result<u32, WorkloadError> {
    let value = given.unwrap_or(default);
    let rule = "from 1 to 16777216";
    let fits = (1..=lengths::MAX_TOKENS).contains(&value);
    if fits { Ok(value) } else { Err(WorkloadError::Range { option, value: value.to_string(), rule }) }
}

fn open(path: &Path) -> Result<(impl std::io::BufRead, String), WorkloadError> {
    let name = path.display().to_string();
    match std::fs::File::open(path) {
        Ok(file) => Ok((std::io::BufReader::new(file), name)),
        Err(error) => Err(WorkloadError::Read { name, reason: error.to_string() }),
    }
}

/// Cuts answers to half the context and prompts, from their end, to what is left.
fn clip(mut job: Job, limit: u32) -> Job {
    let mut room = limit;
    job.turns.retain_mut(|turn| {
        turn.output_tokens = turn.output_tokens.min(limit / 2);
        let Some(for_input) = room.checked_sub(turn.output_tokens).filter(|&room| room > 0) else {
            return false;
        };
        if let Content::Random(segments) = &mut turn.content {
            let mut left = for_input;
            for segment in segments.iter_mut() {
                segment.tokens = segment.tokens.min(left);
                left -= segment.tokens;
            }
            segments.retain(|segment| segment.tokens > 0);
        }
        room = for_input - turn.content.tokens();
        true
    });
    job
}

/// Shrinks every length. A stretch begins and ends where its scaled positions lie, so that shared prefixes remain
/// shared.
fn scale(mut job: Job, factor: f64) -> Job {
    let scaled = |tokens: u32| (f64::from(tokens) * factor) as u32;
    for turn in &mut job.turns {
        turn.output_tokens = scaled(turn.output_tokens).max(1);
        if let Content::Random(segments) = &mut turn.content {
            for segment in segments.iter_mut() {
                let (start, end) = (scaled(segment.start), scaled(segment.start + segment.tokens));
                (segment.start, segment.tokens) = (start, end - start);
            }
            let last = segments.last().copied();
            segments.retain(|segment| segment.tokens > 0);
            if let (true, Some(last)) = (segments.is_empty(), last) {
                segments.push(Segment { tokens: 1, ..last });
            }
        }
    }
    job
}

#[cfg(test)]
mod tests;
