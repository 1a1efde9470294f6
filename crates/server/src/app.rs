//! What the routes share.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use servelab_engine::{AdmissionError, Timestamp};
use servelab_front::ApiKeys;
use servelab_telemetry::{Metrics, RejectionReason, Traces};
use servelab_wire::CommonFields;
use tokio_util::sync::CancellationToken;

use crate::admission::Place;
use crate::clock::Clock;
use crate::engine_thread::Heartbeat;
use crate::errors::ApiError;
use crate::model::Model;

/// Where a replica stands in its life. It only moves down this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// The socket listens and the model is on its way.
    Loading,
    Ready,
    /// Told to stop: nothing new is taken, what runs may finish.
    Draining,
    /// The model cannot be loaded, or its device is lost.
    Failed,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Failed => "failed",
        }
    }
}

/// One replica, as seen from its routes.
pub struct App {
    pub served_model_names: Vec<String>,
    pub max_body_bytes: usize,
    pub max_waiting: u32,
    pub stall_timeout: Duration,
    pub api_keys: ApiKeys,
    pub metrics: Arc<Metrics>,
    pub traces: Traces,
    pub clock: Clock,
    pub heartbeat: Arc<Heartbeat>,
    /// Cancelled when the time to drain is over: answers still under way end with an error.
    pub cut: CancellationToken,
    phase: AtomicU8,
    model: OnceLock<Arc<Model>>,
}

impl App {
    pub fn new(
        options: &crate::ServerOptions,
        api_keys: ApiKeys,
        heartbeat: Arc<Heartbeat>,
        clock: Clock,
    ) -> Self {
        Self {
            served_model_names: options.served_model_names.clone(),
            max_body_bytes: options.max_body_bytes,
            max_waiting: options.max_waiting,
            stall_timeout: options.stall_timeout,
            api_keys,
            metrics: options.metrics.clone(),
            traces: options.traces.clone(),
            clock,
            heartbeat,
            cut: CancellationToken::new(),
            phase: AtomicU8::new(Phase::Loading as u8),
            model: OnceLock::new(),
        }
    }

    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Loading,
            1 => Phase::Ready,
            2 => Phase::Draining,
            _ => Phase::Failed,
        }
    }

    /// Moves on to `phase`, never back.
    pub fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
    }

    /// The model is there; the replica is ready unless it is draining already.
    pub fn loaded(&self, model: Arc<Model>) {
        let _ = self.model.set(model);
        self.enter(Phase::Ready);
    }

    /// The model, whatever the phase; `None` until it is loaded.
    pub fn loaded_model(&self) -> Option<&Arc<Model>> {
        self.model.get()
    }

    /// The model, if requests may be served.
    ///
    /// # Errors
    /// If the replica is loading, draining or lost.
    pub fn model(&self) -> Result<&Arc<Model>, ApiError> {
        let (reason, error) = match (self.phase(), self.model.get()) {
            (Phase::Ready, Some(model)) => return Ok(model),
            (Phase::Draining, _) => (RejectionReason::Draining, ApiError::Draining),
            (Phase::Failed, _) => (RejectionReason::NotReady, ApiError::Down),
            (Phase::Loading | Phase::Ready, _) => {
                (RejectionReason::NotReady, ApiError::Loading(self.loading_retry()))
            }
        };
        self.metrics.admission_rejections.of(reason).inc();
        Err(error)
    }

    /// Loading takes an unknown time; what it has taken so far is the best guess of what is left.
    fn loading_retry(&self) -> Duration {
        Duration::from_secs(self.clock.now().as_secs().clamp(1, 30))
    }

    /// Takes a place in the replica for each of `prompts`, all with `n` choices.
    ///
    /// # Errors
    /// If there are not as many, or if `n` choices can never run. (The engine would say so too, but by
    /// then each choice would have a detokenizer.)
    pub fn places(&self, model: &Model, prompts: usize, n: u32) -> Result<Vec<Place>, ApiError> {
        let max_running = model.engine.max_running;
        if n > max_running {
            self.metrics.admission_rejections.of(RejectionReason::TooManyChoices).inc();
            return Err(ApiError::Admission(AdmissionError::TooManyChoices { n, max_running }));
        }
        model.admission.enter(prompts).inspect_err(|_| {
            self.metrics.admission_rejections.of(RejectionReason::QueueFull).inc();
        })
    }

    /// The name that answers carry.
    pub fn model_name(&self) -> &str {
        self.served_model_names.first().map_or("model", String::as_str)
    }

    /// # Errors
    /// If the client asked for a model that is not served here. One that names none gets what is there.
    pub fn check_name(&self, name: Option<&str>) -> Result<(), ApiError> {
        let Some(name) = name else { return Ok(()) };
        if self.served_model_names.iter().any(|served| served == name) {
            return Ok(());
        }
        let served: Vec<String> = self.served_model_names.iter().map(|name| format!("{name:?}")).collect();
        let model = name.chars().take(128).collect();
        Err(ApiError::NoSuchModel { model, served: served.join(", ") })
    }

    /// Whether the engine has had work for too long without a step.
    pub fn stalled(&self) -> bool {
        self.heartbeat.stalled_for(self.clock.now()) > self.stall_timeout
    }
}

/// What answers repeat about themselves.
#[derive(Clone, Debug)]
pub struct Heading {
    pub id: Arc<str>,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: Arc<str>,
    pub system_fingerprint: Arc<str>,
}

impl Heading {
    /// `kind` is `chatcmpl` or `cmpl`. The answer is called by the name that the client used.
    pub fn new(app: &App, kind: &str, common: &CommonFields) -> Self {
        Self {
            id: format!("{kind}-{}", uuid::Uuid::new_v4().simple()).into(),
            created: app.clock.unix(),
            model: common.model.as_deref().unwrap_or(app.model_name()).into(),
            system_fingerprint: concat!("servelab-", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// When the HTTP request reached the server; an extension of the request.
#[derive(Clone, Copy, Debug)]
pub struct Arrived(pub Timestamp);
