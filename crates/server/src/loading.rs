//! The engine's thread from its first line: loads the model, builds the engine, runs it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use servelab_engine::{Engine, EngineConfig};
use servelab_telemetry::{CacheConfig, Device};
use tokio::sync::{mpsc, oneshot};

use crate::admission::Admission;
use crate::app::App;
use crate::blocking::Blocking;
use crate::engine_thread::{EngineEnd, EngineThread};
use crate::kv_events::log::KvLog;
use crate::model::Model;
use crate::options::{LoadError, LoadedModel, ServerOptions};
use crate::server::ServeError;

/// What the thread tells.
pub struct Loading {
    pub loaded: oneshot::Receiver<Result<Arc<Model>, ServeError>>,
    pub ended: oneshot::Receiver<EngineEnd>,
}

/// Starts the thread.
///
/// # Errors
/// If the system gives no thread.
pub fn spawn(options: ServerOptions, app: Arc<App>) -> std::io::Result<Loading> {
    let (tell_loaded, loaded) = oneshot::channel();
    let (tell_ended, ended) = oneshot::channel();
    std::thread::Builder::new().name("engine".into()).spawn(move || {
        let (model, thread) = match load(options, &app) {
            Ok(loaded) => loaded,
            Err(error) => {
                let _ = tell_loaded.send(Err(error));
                return;
            }
        };
        drop(app);
        let _ = tell_loaded.send(Ok(model));
        let _ = tell_ended.send(thread.run());
    })?;
    Ok(Loading { loaded, ended })
}

fn load(options: ServerOptions, app: &App) -> Result<(Arc<Model>, EngineThread), ServeError> {
    let (max_waiting, seed) = (options.max_waiting, options.seed);
    let listens = options.kv_zmq.is_some();
    let kv = Arc::new(KvLog::new(listens));
    let loaded = catch_unwind(AssertUnwindSafe(options.load))
        .map_err(|_| LoadError("the loader panicked; its message stands above".into()))??;
    let admission = Arc::new(Admission::new(loaded.engine.max_running, max_waiting, app.clock));
    let config = EngineConfig {
        max_waiting: loaded.engine.max_running.saturating_add(max_waiting),
        ..loaded.engine.clone()
    };
    let (commands, received) = mpsc::channel(commands_room(&config));
    tell_metrics(app, &loaded);
    let model = Arc::new(Model {
        tokenizer: loaded.prompter.tokenizer.clone(),
        prompter: Arc::new(loaded.prompter),
        text_revision: loaded.text_files.revision(),
        text_files: loaded.text_files,
        eos_token_ids: loaded.eos_token_ids.into(),
        vocab_size: loaded.vocab_size,
        root: loaded.root,
        device: loaded.device,
        defaults: loaded.sampling_defaults,
        engine: config.clone(),
        commands,
        kv: kv.clone(),
        admission,
        blocking: Blocking::new(),
        clock: app.clock,
        cut: app.cut.clone(),
        requests: AtomicU64::new(0),
        seed,
    });
    let mut engine = Engine::new(config, loaded.runner)?;
    engine.listen_to_kv(listens);
    let (metrics, heartbeat) = (app.metrics.clone(), app.heartbeat.clone());
    Ok((model, EngineThread::new(engine, received, metrics, heartbeat, app.clock, kv)))
}

/// Room in the command channel: every request inside keeps a place for its abort, and as much again and
/// some more is left for all other commands.
fn commands_room(config: &EngineConfig) -> usize {
    2 * config.max_waiting as usize + 64
}

fn tell_metrics(app: &App, loaded: &LoadedModel) {
    let cache = CacheConfig {
        block_size: loaded.engine.block_size,
        num_blocks: loaded.engine.num_blocks,
        max_model_len: loaded.engine.max_model_len,
        dtype: &loaded.kv_dtype,
        prefix_cache: loaded.engine.prefix_cache,
    };
    app.metrics.max_running.set(i64::from(loaded.engine.max_running));
    let told = app.metrics.set_cache_config(cache);
    let device = &loaded.device;
    let told = told.and_then(|()| {
        app.metrics.set_device(Device {
            kind: &device.kind,
            name: &device.name,
            gpus: device.gpus,
            speed: device.speed.as_deref().unwrap_or_default(),
        })
    });
    let told = told.and_then(|()| app.metrics.set_model_load(|stage| loaded.load_times.of(stage)));
    let told = told.and_then(|()| app.metrics.set_model_memory(|part| loaded.memory.of(part)));
    if let Err(error) = told {
        tracing::warn!(%error, "a metric of the loaded model is missing");
    }
}
