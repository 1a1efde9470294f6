//! A server as the target: its model, its context, and what prompts can be made of there.

use servelab_bench::client::{Client, Timeouts};
use servelab_bench::prompt::{Pool, Writer};
use servelab_bench::result::{ClientInfo, TargetInfo};
use servelab_bench::server;
use servelab_bench::session::Http;
use servelab_bench::vocabulary::discover;

use super::machine;
use super::settings::{BenchSettings, HttpSettings};
use super::{Error, Prepared};

/// Asks the server what has to be known before it is measured.
///
/// # Errors
/// If it does not answer, does not serve the model, or has too short a context for the workload.
pub async fn prepare(settings: &BenchSettings, http: &HttpSettings) -> Result<Prepared<Http>, Error> {
    let client = Client::new(http.target.clone(), http.api_key.as_ref(), http.timeouts).await?;
    let model = server::model(&client, http.model.as_deref()).await?;
    let workload = match model.max_model_len {
        Some(limit) => settings.workload.clone().within(limit, settings.fit)?,
        None => settings.workload.clone(),
    };
    let pool = match workload.is_given {
        true => Pool::Words { words: [].into(), overhead_tokens: 0, tokens_per_word: 1.0 },
        false => discover(&client, http.endpoint, &model.id, http.form).await?,
    };
    let info = TargetInfo::Http {
        url: http.target.to_string(),
        endpoint: http.endpoint,
        server: server::facts(&client).await,
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
    Ok(Prepared { target: Http { client }, info, model, workload, writer, client: client_info })
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
