//! A server as the target: its model, its context, and what prompts can be made of there.

use std::time::Duration;

use servelab_bench::client::{Client, Timeouts};
use servelab_bench::phases::Extent;
use servelab_bench::prompt::{Pool, Writer};
use servelab_bench::result::{ClientInfo, ModelInfo, TargetInfo};
use servelab_bench::run::LoadShape;
use servelab_bench::server::{self, ServerError};
use servelab_bench::session::{self, Http, Loads};
use servelab_bench::vocabulary::{self, discover};
use servelab_bench::workload::Workload;

use servelab_telemetry::Traces;

use super::machine;
use super::settings::{BenchSettings, HttpSettings};
use super::{Error, Prepared};

/// The name that a request carries where none was given and the server tells none.
const UNKNOWN_MODEL: &str = "unknown";

/// Asks the server what has to be known before it is measured. One that does not answer is measured all the same, with
/// a single request: how it fails is the result.
///
/// # Errors
/// If it is not ready in the time that it has for that, does not serve the model, or has too short a context for the
/// workload.
pub async fn prepare(
    settings: &BenchSettings,
    http: &HttpSettings,
    traces: &Traces,
) -> Result<Prepared<Http>, Error> {
    if let Some(limit) = http.wait_ready {
        let questions = http.timeouts.of_questions();
        let timeouts = Timeouts { total: questions.total.min(limit), ..questions };
        let client = Client::new(http.target.clone(), http.api_key.as_ref(), timeouts).await?;
        server::wait_until_ready(&client, limit).await?;
    }
    let client =
        Client::new(http.target.clone(), http.api_key.as_ref(), http.timeouts).await?.traced(traces.clone());
    match ask_model(&client, http.model.as_deref()).await {
        Ok(model) => prepared(settings, http, client, model, None).await,
        Err(error) if error.is_usage() => Err(error.into()),
        Err(error) => {
            let timeouts = http.timeouts.of_questions();
            let client = Client::new(http.target.clone(), http.api_key.as_ref(), timeouts).await?;
            let id = http.model.clone().unwrap_or_else(|| UNKNOWN_MODEL.to_owned());
            let model = ModelInfo { id, ..ModelInfo::default() };
            prepared(settings, http, client, model, Some(error)).await
        }
    }
}

/// The model to measure. A server that answers but lists no models is taken at the user's word.
async fn ask_model(client: &Client, asked: Option<&str>) -> Result<ModelInfo, ServerError> {
    match (server::model(client, asked).await, asked) {
        (Err(ServerError::Refused { .. } | ServerError::NotUnderstood { .. }), Some(name)) => {
            Ok(ModelInfo { id: name.to_owned(), ..ModelInfo::default() })
        }
        (found, _) => found,
    }
}

/// How a server is looked at that does not say what it serves: with one request.
pub fn single_request(settings: &session::Settings) -> session::Settings {
    let shape = LoadShape::Closed { concurrency: 1, think_time: Duration::ZERO };
    session::Settings {
        loads: Loads::Ladder(vec![shape]),
        measured: Extent::Requests(1),
        warm_up: Some(Extent::Requests(0)),
        cool_down: Some(false),
        repeats: 1,
        ..settings.clone()
    }
}

/// What prompts are made of. A server that does not answer here fails the requests of the run, which counts them.
async fn pool(
    client: &Client,
    http: &HttpSettings,
    workload: &Workload,
    model: &str,
) -> Result<Pool, ServerError> {
    if workload.is_given {
        return Ok(Pool::Words { words: [].into(), overhead_tokens: 0, tokens_per_word: 1.0 });
    }
    match discover(client, http.endpoint, model, http.form).await {
        Err(error) if !error.is_usage() => Ok(vocabulary::unknown()),
        found => found,
    }
}

async fn prepared(
    settings: &BenchSettings,
    http: &HttpSettings,
    client: Client,
    model: ModelInfo,
    unanswered: Option<ServerError>,
) -> Result<Prepared<Http>, Error> {
    let workload = match model.max_model_len {
        Some(limit) => settings.workload.clone().within(limit, settings.fit)?,
        None => settings.workload.clone(),
    };
    let answers = unanswered.is_none();
    let pool = if answers { pool(&client, http, &workload, &model.id).await? } else { vocabulary::unknown() };
    let info = TargetInfo::Http {
        url: http.target.to_string(),
        endpoint: http.endpoint,
        server: if answers { server::facts(&client).await } else { Default::default() },
    };
    let writer = Writer {
        endpoint: http.endpoint,
        model: model.id.clone(),
        pool,
        key: 0,
        salt_text: None,
        ignore_eos: settings.ignore_eos,
        temperature: settings.temperature,
        extra_body: settings.extra_body.clone(),
    };
    let client_info = client_info(settings, http.timeouts);
    Ok(Prepared {
        target: Http { client },
        info,
        model,
        workload,
        writer,
        client: client_info,
        unanswered: unanswered.map(|error| error.to_string()),
    })
}

fn client_info(settings: &BenchSettings, timeouts: Timeouts) -> ClientInfo {
    ClientInfo {
        max_in_flight: settings.session.max_in_flight,
        connect_timeout_seconds: timeouts.connect.as_secs_f64(),
        first_byte_timeout_seconds: timeouts.first_byte.as_secs_f64(),
        idle_timeout_seconds: timeouts.idle.as_secs_f64(),
        total_timeout_seconds: timeouts.total.as_secs_f64(),
        ..machine::describe()
    }
}
