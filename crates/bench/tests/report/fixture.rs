//! Results to report on: benchmarks of the real engine on a GPU that only tells how long it would take, in virtual
//! time. Nothing depends on this machine, so that a report of them is the same everywhere.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use servelab_bench::arrivals::ArrivalShape;
use servelab_bench::find_rate::FindRate;
use servelab_bench::limits;
use servelab_bench::live::Live;
use servelab_bench::offline::{Offline, VirtualTime};
use servelab_bench::phases::Extent;
use servelab_bench::prompt::{Pool, Writer};
use servelab_bench::report::Details;
use servelab_bench::result::{
    BenchResult, ClientInfo, Endpoint, FailureClass, FailureCount, Header, Load, Metrics, ModelInfo,
    PrefixCacheDelta, PromptForm, Repeat, RequestRecord, SCHEMA_VERSION, Series, Slo, TargetInfo, Trial,
    WorkloadInfo,
};
use servelab_bench::run::LoadShape;
use servelab_bench::session::{Loads, Observer, Session, Settings};
use servelab_bench::workload::lengths::Span;
use servelab_bench::workload::{Workload, WorkloadOptions};
use servelab_engine::{Engine, EngineConfig, ModelRunner, RowOutput, RunnerError, Step, StepOutput};
use servelab_sim::{Dtype, HardwareProfile, ModelShape, Roofline, SequenceWork, VirtualClock};
use tokio_util::sync::CancellationToken;

/// How much longer than its floor a step takes, and what it takes besides.
const FACTOR: f64 = 1.45;
const OVERHEAD_SECONDS: f64 = 0.0006;

/// Answers with nothing, after the time that a GPU would take.
struct Timed {
    roofline: Roofline,
    clock: VirtualClock,
}

impl ModelRunner for Timed {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        let work = step.sequences.iter().map(|sequence| {
            let new_tokens = sequence.tokens.len() as u64;
            SequenceWork {
                cached_tokens: u64::from(sequence.context_len) - new_tokens,
                new_tokens,
                logits_rows: 1,
            }
        });
        let seconds = FACTOR * self.roofline.step(work).floor_seconds() + OVERHEAD_SECONDS;
        self.clock.advance_to(self.clock.now() + Duration::from_secs_f64(seconds));
        let row = |_| RowOutput { token: 7, logprobs: None };
        Ok(StepOutput { rows: step.rows.iter().map(row).collect() })
    }
}

fn llama_8b() -> ModelShape {
    ModelShape {
        name: "Llama-3-8B".into(),
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 14_336,
        vocabulary: 128_256,
        tied_embeddings: false,
        max_context_tokens: 8192,
        sliding_window: None,
        parameters: 8_030_261_248,
        weight_dtype: Dtype::Bf16,
        kv_dtype: Dtype::Bf16,
    }
}

struct Silent;

impl Observer for Silent {
    fn begins(&mut self, _: &Load, _: u32, _: u32, _: Arc<Live>) {}
    fn ended(&mut self, _: &Load, _: &Repeat) {}
    fn judged(&mut self, _: &Trial) {}
}

fn closed(concurrency: u32) -> LoadShape {
    LoadShape::Closed { concurrency, think_time: Duration::ZERO }
}

fn settings(loads: Loads, requests: u64, repeats: u32) -> Settings {
    Settings {
        loads,
        measured: Extent::Requests(requests),
        warm_up: None,
        cool_down: None,
        repeats,
        seed: 0,
        salted: false,
        slo: None,
        max_in_flight: 4096,
    }
}

/// A ladder of concurrencies from 1 to `most`, three repeats each.
pub fn ladder(most: u32) -> (BenchResult, Details) {
    let shapes = std::iter::successors(Some(1), |c| Some(2 * c)).take_while(|c| *c <= most).map(closed);
    run(&settings(Loads::Ladder(shapes.collect()), 96, 3), (200..=600, 48..=160))
}

/// One closed loop, as `servelab bench --concurrency 16` runs it.
pub fn single() -> (BenchResult, Details) {
    run(&settings(Loads::Ladder(vec![closed(16)]), 120, 3), (200..=1200, 32..=200))
}

/// A search for the highest rate that keeps an SLO.
pub fn search() -> (BenchResult, Details) {
    let search = FindRate { start: 4.0, ..FindRate::default() };
    let loads = Loads::Search { arrivals: ArrivalShape::poisson(4.0), max_concurrency: None, search };
    let limits = ["ttft=300ms@p95", "tpot=12ms@p95"].map(|limit| limit.parse().unwrap());
    let slo = Some(Slo { limits: limits.into() });
    run(&Settings { slo, ..settings(loads, 200, 1) }, (200..=600, 48..=160))
}

/// Many requests at a rate that is close to too much.
pub fn large(requests: u64) -> (BenchResult, Details) {
    let open = LoadShape::Open { arrivals: ArrivalShape::poisson(150.0), max_concurrency: None };
    run(&settings(Loads::Ladder(vec![open]), requests, 1), (100..=200, 4..=12))
}

type Lengths = (std::ops::RangeInclusive<u32>, std::ops::RangeInclusive<u32>);

fn run(settings: &Settings, (input, output): Lengths) -> (BenchResult, Details) {
    let span =
        |range: std::ops::RangeInclusive<u32>| Some(Span { least: *range.start(), most: *range.end() });
    let options = WorkloadOptions { input: span(input), output: span(output), ..WorkloadOptions::default() };
    let workload = Workload::new(&options).unwrap();
    let roofline = Roofline::new(&llama_8b(), &HardwareProfile::named("h100").unwrap(), 1).unwrap();
    let mut details = Details::default();
    let mut keep = |record: &RequestRecord| -> io::Result<()> {
        details.add(record);
        Ok(())
    };
    let session = Session {
        target: target(roofline.clone()),
        workload: &workload,
        writer: writer(),
        settings,
        observer: &mut Silent,
        records: &mut keep,
        stop: CancellationToken::new(),
    };
    // Its clock jumps to the next timer whenever everybody waits.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let mut measured = runtime.block_on(session.run()).unwrap();
    for point in &mut measured.points {
        point.limits = limits::limits(&roofline, "Llama-3-8B, bf16", "NVIDIA H100 SXM", &point.metrics);
    }
    let result = BenchResult {
        schema_version: SCHEMA_VERSION,
        header: header(&workload, settings),
        points: measured.points,
        search: measured.search,
    };
    (result, details)
}

fn target(roofline: Roofline) -> Offline<Timed, VirtualTime> {
    let config = EngineConfig {
        block_size: 16,
        num_blocks: 32_768,
        max_model_len: 8192,
        max_batched_tokens: 2048,
        max_running: 128,
        max_waiting: 4096,
        prefix_cache: false,
    };
    let clock = VirtualClock::default();
    let engine = Engine::new(config, Timed { roofline, clock: clock.clone() }).unwrap();
    Offline::new(engine, VirtualTime::of(clock), Arc::default())
}

fn writer() -> Writer {
    Writer {
        endpoint: Endpoint::Completions,
        model: "Llama-3-8B".into(),
        pool: Pool::Ids((0..1000).collect()),
        key: 1,
        salt_text: None,
        ignore_eos: true,
        temperature: Some(0.0),
        extra_body: serde_json::Map::new(),
    }
}

/// As that of a server would be.
fn header(workload: &Workload, settings: &Settings) -> Header {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    Header {
        tool_version: "0.1.0".into(),
        tool_commit: Some("0123abc".into()),
        started_unix_seconds: 1_764_000_000,
        command: ["servelab", "bench", "--url", "http://gpu-1:8000", "--hardware", "h100"]
            .map(Into::into)
            .into(),
        label: None,
        target: TargetInfo::Http {
            url: "http://gpu-1:8000".into(),
            endpoint: Endpoint::Completions,
            server: map(&[("version", "0.1.0"), ("block_size", "16")]),
        },
        model: ModelInfo {
            id: "Llama-3-8B".into(),
            root: Some("a simulated device".into()),
            dtype: Some("bf16".into()),
            max_model_len: Some(8192),
        },
        hardware: Some("NVIDIA H100 SXM".into()),
        gpus: Some(1),
        client: ClientInfo {
            cpu: "Example CPU".into(),
            cores: 16,
            os: "Linux 6.1".into(),
            max_in_flight: 4096,
            connect_timeout_seconds: 10.0,
            first_byte_timeout_seconds: 600.0,
            idle_timeout_seconds: 120.0,
            total_timeout_seconds: 3600.0,
        },
        workload: WorkloadInfo {
            name: workload.name.clone(),
            description: workload.description.clone(),
            settings: workload.settings.clone(),
            seed: settings.seed,
            salted: true,
            prompt_form: PromptForm::TokenIds,
            ignore_eos: true,
            temperature: Some(0.0),
        },
        slo: settings.slo.clone(),
        unanswered: None,
        metadata: map(&[("clocks", "1980 MHz"), ("machine", "not shared")]),
    }
}

/// Ends an element, an attribute, a script, a comment and a Markdown table, wherever it is put.
pub const HOSTILE: &str =
    "</script></title><img src=x onerror=alert(1)>\"'>-->]]>{{ 7*7 }}|\u{202e}\u{0}&<b>\n| a |";

/// A result whose every text is an attack, and whose figures are all wrong.
pub fn hostile() -> (BenchResult, Details) {
    let (mut result, details) = ladder(2);
    let bad = || HOSTILE.to_owned();
    let map = || BTreeMap::from([(bad(), bad())]);
    let header = &mut result.header;
    (header.tool_version, header.tool_commit, header.label) = (bad(), Some(bad()), Some(bad()));
    header.command = vec![bad()];
    header.target = TargetInfo::Http { url: bad(), endpoint: Endpoint::Chat, server: map() };
    header.model = ModelInfo { id: bad(), root: Some(bad()), dtype: Some(bad()), max_model_len: None };
    (header.hardware, header.gpus, header.metadata) = (Some(bad()), Some(0), map());
    (header.client.cpu, header.client.os) = (bad(), bad());
    (header.workload.name, header.workload.description, header.workload.settings) = (bad(), bad(), map());
    for point in &mut result.points {
        point.load = Load::Open { rate: Some(1.0), burstiness: None, shape: bad(), max_concurrency: Some(0) };
        let limits = point.limits.as_mut().unwrap();
        (limits.hardware, limits.model) = (bad(), bad());
        for row in &mut limits.rows {
            (row.because, row.beaten, row.measured) = (bad(), true, f64::NAN);
        }
        for repeat in &mut point.repeats {
            spoil(repeat);
        }
    }
    (result, details)
}

fn spoil(repeat: &mut Repeat) {
    repeat.client.bound = Some(HOSTILE.into());
    repeat.littles_law.holds = false;
    repeat.window_seconds = (f64::NAN, f64::INFINITY);
    repeat.series.bucket_seconds = 1e300;
    repeat.prefix_cache =
        Some(PrefixCacheDelta { metrics_prefix: HOSTILE.into(), query_tokens: 0, hit_tokens: u64::MAX });
    repeat.failures = vec![FailureCount {
        class: FailureClass::Status,
        name: HOSTILE.into(),
        measured: 3,
        all: u64::MAX / 4096,
        example: HOSTILE.repeat(100),
    }];
}

/// Nothing completed: the server was not there.
pub fn empty() -> (BenchResult, Details) {
    let (mut result, _) = ladder(1);
    for point in &mut result.points {
        point.metrics = Metrics { requests: 10, failed: 10, ..Metrics::default() };
        (point.limits, point.intervals) = (None, BTreeMap::new());
        for repeat in &mut point.repeats {
            (repeat.metrics, repeat.series) = (point.metrics.clone(), Series::default());
        }
    }
    (result.header.hardware, result.header.gpus) = (None, None);
    (result, Details::default())
}
