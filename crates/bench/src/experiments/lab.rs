//! What all experiments share: the server under test, requests to it, and the order of prediction and measurement.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use servelab_sim::formulas::{DecodeModel, Gpus};
use servelab_sim::{HardwareProfile, ModelShape};
use tokio_util::sync::CancellationToken;

use super::expect::Prefill;
use super::measurement::{Circumstances, Finding, Interval, Prediction, PredictionKind};
use super::mfu::Mfu;
use super::replica::{Launcher, Replica};
use super::{ExperimentError, ExperimentId};
use crate::arrivals::ArrivalShape;
use crate::client::{Observed, Outgoing};
use crate::ledger::Unit;
use crate::live::Live;
use crate::phases::{Extent, PhasePlan};
use crate::prompt::{Content, Job, Pool, Segment, Writer, key};
use crate::result::{Endpoint, Outcome, RequestRecord};
use crate::run::{LoadShape, RunLog, RunPlan, run};
use crate::server;
use crate::vocabulary::{FormChoice, discover};

/// Who watches.
pub trait Observer {
    /// From here on experiments are about something else, or about the first thing.
    fn turns_to(&mut self, circumstances: &Circumstances);
    fn begins(&mut self, experiment: ExperimentId, number: usize, of: usize);
    /// What is expected, said before it is measured.
    fn predicts(&mut self, label: &str, unit: Unit, prediction: &Prediction);
    /// What is being done, in a few words.
    fn progress(&mut self, text: &str);
    fn found(&mut self, finding: &Finding);
    fn ended(&mut self, experiment: ExperimentId, took: Duration, error: Option<&ExperimentError>);
}

/// What the experiments are about.
#[derive(Clone, Debug)]
pub struct Subject {
    pub launcher: Launcher,
    pub model: ModelShape,
    /// What predictions are made from.
    pub hardware: HardwareProfile,
    pub is_gpu: bool,
    pub dollars_per_hour: f64,
}

/// A bench for experiments.
pub struct Lab<'a> {
    pub subject: &'a Subject,
    observer: &'a mut dyn Observer,
    replica: Option<Replica>,
    /// The same for every server of the model.
    pool: Option<Pool>,
    model_name: String,
    max_model_len: u32,
    pace: Option<Pace>,
    next_stream: u64,
    /// Of all servers of the experiment; the commands of one that simulates.
    pub flags: Vec<String>,
    pub findings: Vec<Finding>,
}

/// How fast the server is when it is alone with one request; experiments size their loads by it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Between two tokens.
    pub step_seconds: f64,
    /// By how much a step takes longer for each further sequence in it.
    pub step_more_seconds: f64,
    /// Of a first token, besides what grows with the prompt.
    pub overhead_seconds: f64,
    /// Of short prompts, the mean.
    pub prefill_seconds_per_token: f64,
    /// What F5 reaches here.
    pub mfu: Mfu,
}

/// A prediction that was said; what it is of comes in the finding.
#[must_use]
pub struct Said {
    key: &'static str,
    label: String,
    unit: Unit,
    prediction: Option<Prediction>,
}

/// Requests of one shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub input_tokens: u32,
    pub output_tokens: u32,
}

impl<'a> Lab<'a> {
    pub fn new(subject: &'a Subject, observer: &'a mut dyn Observer) -> Self {
        Self {
            subject,
            observer,
            replica: None,
            pool: None,
            model_name: String::new(),
            max_model_len: 0,
            pace: None,
            next_stream: 0,
            flags: Vec::new(),
            findings: Vec::new(),
        }
    }

    /// Ends what was begun with another subject.
    pub async fn turn_to(&mut self, subject: &'a Subject) {
        self.stop().await;
        self.subject = subject;
        (self.pool, self.pace) = (None, None);
    }

    pub fn observer(&mut self) -> &mut dyn Observer {
        self.observer
    }

    pub fn progress(&mut self, text: &str) {
        self.observer.progress(text);
    }

    // ---- prediction and measurement ----

    /// Says what is expected. Only then can it be found.
    pub fn predict(
        &mut self,
        key: &'static str,
        label: impl Into<String>,
        unit: Unit,
        kind: PredictionKind,
        value: f64,
        because: String,
    ) -> Said {
        let label = label.into();
        let prediction = Prediction { value, kind, because };
        self.observer.predicts(&label, unit, &prediction);
        Said { key, label, unit, prediction: Some(prediction) }
    }

    /// What nobody can say before.
    pub fn unpredicted(key: &'static str, label: impl Into<String>, unit: Unit) -> Said {
        Said { key, label: label.into(), unit, prediction: None }
    }

    pub fn found(&mut self, said: Said, measured: f64, interval: Option<Interval>, note: Option<String>) {
        let Said { key, label, unit, prediction } = said;
        let finding = Finding { key: key.to_owned(), label, unit, prediction, measured, interval, note };
        self.observer.found(&finding);
        self.findings.push(finding);
    }

    // ---- the server ----

    /// The server with these flags; the one that runs if it has them, else a new one in its place.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn replica(&mut self, flags: &[&str]) -> Result<&Replica, ExperimentError> {
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        if let Some(running) = self.replica.take_if(|replica| replica.flags != flags) {
            running.kill().await;
        }
        for flag in &flags {
            if !self.flags.contains(flag) {
                self.flags.push(flag.clone());
            }
        }
        if self.replica.is_none() {
            self.observer.progress("starting a server");
            let replica = self.subject.launcher.start(&flags).await?;
            let model = server::model(&replica.client, None).await?;
            self.max_model_len = model.max_model_len.unwrap_or(u32::MAX);
            self.model_name = model.id;
            if self.pool.is_none() {
                let (endpoint, form) = (Endpoint::Completions, FormChoice::TokenIds);
                self.pool = Some(discover(&replica.client, endpoint, &self.model_name, form).await?);
            }
            self.replica = Some(replica);
        }
        self.running()
    }

    /// The server that runs.
    ///
    /// # Errors
    /// If none was started.
    pub fn running(&self) -> Result<&Replica, ExperimentError> {
        self.replica.as_ref().ok_or(ExperimentError::NotUnderstood("a server that was never started"))
    }

    /// Ends the server, if one runs.
    pub async fn stop(&mut self) {
        if let Some(replica) = self.replica.take() {
            replica.kill().await;
        }
    }

    /// Longest sequence of the running server, in tokens.
    pub fn max_model_len(&self) -> u32 {
        self.max_model_len
    }

    // ---- requests ----

    fn writer(&self) -> Result<Writer, ExperimentError> {
        let pool = self.pool.clone().ok_or(ExperimentError::NotUnderstood("/tokenize"))?;
        // An answer that is not ended may go on in special tokens; unseen, they could not be timed.
        let extra_body = Map::from_iter([("skip_special_tokens".to_owned(), false.into())]);
        Ok(Writer {
            endpoint: Endpoint::Completions,
            model: self.model_name.clone(),
            pool,
            key: key(0, 0),
            salt_text: None,
            ignore_eos: true,
            temperature: Some(0.0),
            extra_body,
        })
    }

    /// A stretch of tokens that no other request has.
    pub fn fresh(&mut self, tokens: u32) -> Segment {
        self.next_stream += 1;
        Segment::of(self.next_stream, tokens)
    }

    /// A request, ready to be sent.
    ///
    /// # Errors
    /// If no server was started.
    pub fn write(&self, segments: Vec<Segment>, output_tokens: u32) -> Result<Outgoing, ExperimentError> {
        let job = Job::single(Content::Random(segments), output_tokens);
        Ok(self.writer()?.write(&job.turns, &[]))
    }

    /// Sends one request and reads its answer to the end.
    ///
    /// # Errors
    /// If it fails.
    pub async fn ask(&self, outgoing: &Outgoing) -> Result<Observed, ExperimentError> {
        let client = &self.running()?.client;
        let mut observed = Observed::scheduled(client.clock().now());
        client.stream(outgoing, &mut observed, &Live::default()).await?;
        Ok(observed)
    }

    /// Runs a load of requests that share nothing, and returns all of it.
    ///
    /// # Errors
    /// If a request fails.
    pub async fn load(
        &mut self,
        load: LoadShape,
        phases: PhasePlan,
        shape: Shape,
    ) -> Result<RunLog, ExperimentError> {
        let first = self.next_stream + 1;
        // More than any of the loads sends.
        self.next_stream += 1 << 20;
        let jobs = (first..).map(move |stream| {
            Job::single(Content::Random(vec![Segment::of(stream, shape.input_tokens)]), shape.output_tokens)
        });
        let plan = RunPlan { shape: load, phases, max_in_flight: 4096, seed: 1 };
        let writer = Arc::new(self.writer()?);
        let client = &self.running()?.client;
        let live = Arc::new(Live::default());
        let log = run(client, writer, Box::new(jobs), &plan, live, CancellationToken::new()).await;
        match log.records.iter().find_map(failure) {
            Some(message) => Err(ExperimentError::Request(message)),
            None => Ok(log),
        }
    }

    /// Sends `count` requests at once, and waits for all.
    ///
    /// # Errors
    /// If one fails.
    pub async fn together(
        &mut self,
        count: u32,
        shape: Shape,
    ) -> Result<Vec<RequestRecord>, ExperimentError> {
        let load = LoadShape::Open { arrivals: ArrivalShape::AllAtOnce, max_concurrency: None };
        let measured = Extent::Requests(u64::from(count));
        let phases = PhasePlan { warm_up: Extent::Requests(0), measured, cool_down: false };
        Ok(self.load(load, phases, shape).await?.records)
    }

    /// Has the server take `count` sequences at the same moment, as the prompts of one request, and waits for all.
    /// Requests of their own would come one after the other.
    ///
    /// # Errors
    /// If it fails.
    pub async fn in_one_request(&mut self, count: u32, shape: Shape) -> Result<(), ExperimentError> {
        let writer = self.writer()?;
        let prompts: Vec<Value> =
            (0..count).map(|_| writer.ids(&[self.fresh(shape.input_tokens)]).into()).collect();
        let mut body = writer.fields(shape.output_tokens);
        body.insert("prompt".to_owned(), prompts.into());
        let outgoing = Outgoing {
            endpoint: Endpoint::Completions,
            body: Value::Object(body).to_string().into(),
            output_tokens: count * shape.output_tokens,
            keep_text: false,
        };
        self.ask(&outgoing).await.map(drop)
    }

    // ---- sizes ----

    /// The pace of the running server; measured on the first that is asked for it.
    ///
    /// # Errors
    /// If a request fails.
    pub async fn pace(&mut self) -> Result<Pace, ExperimentError> {
        if let Some(pace) = self.pace {
            return Ok(pace);
        }
        self.observer.progress("a first look at its pace");
        let pace = super::pace::measure(self).await?;
        self.pace = Some(pace);
        Ok(pace)
    }

    /// As many as take about `seconds` at `each`, within bounds.
    pub fn fitting(seconds: f64, each: f64, least: u32, most: u32) -> u32 {
        ((seconds / each.max(1e-9)) as u32).clamp(least, most)
    }

    /// The model as F2 and F3 take it.
    pub fn decode_model(&self) -> DecodeModel {
        let model = &self.subject.model;
        DecodeModel {
            streamed_parameters: model.streamed_parameters() as f64,
            streamed_bytes: model.streamed_bytes(),
            kv_bytes_per_token: model.kv_bytes_per_token(),
        }
    }

    /// F5 of the model on the hardware.
    ///
    /// # Errors
    /// As [`Lab::gpus`].
    pub fn prefill(&self) -> Result<Prefill<'a>, ExperimentError> {
        let flops_per_second = self.gpus()?.flops_per_second;
        Ok(Prefill { shape: &self.subject.model, flops_per_second })
    }

    /// The hardware as F2 and F3 take it.
    ///
    /// # Errors
    /// If it has no arithmetic for the weights.
    pub fn gpus(&self) -> Result<Gpus, ExperimentError> {
        let hardware = &self.subject.hardware;
        let (_, flops_per_second) = hardware.arithmetic(self.subject.model.weight_dtype)?;
        let bandwidth_bytes_per_second = hardware.bandwidth_bytes_per_second;
        Ok(Gpus { count: 1, bandwidth_bytes_per_second, flops_per_second })
    }
}

fn failure(record: &RequestRecord) -> Option<String> {
    match &record.outcome {
        Outcome::Failed { class, message, .. } => Some(format!("{}: {message}", class.name())),
        Outcome::Completed | Outcome::Cut => None,
    }
}
