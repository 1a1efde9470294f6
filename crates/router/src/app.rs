//! What the routes share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderMap, HeaderValue};
use servelab_front::{ApiKeys, UnusableKey};
use servelab_telemetry::Traces;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::choice::policy::Policy;
use crate::decisions::Decisions;
use crate::discovery::Members;
use crate::errors::RouterError;
use crate::idempotency::Answers;
use crate::limits::Limits;
use crate::limits::queue::Gate;
use crate::limits::redis::{self, Shared};
use crate::metrics::RouterMetrics;
use crate::options::{RouterOptions, Timeouts};
use crate::parity::desk::Desk;
use crate::parity::tokeniser::Tokenisers;
use crate::parity::watch::Watch;
use crate::proxy::budget::Budget;
use crate::proxy::hedge::FirstBytes;
use crate::proxy::hold::Hold;
use crate::proxy::unread::Unread;
use crate::replicas::client::{Client, client};
use crate::replicas::registry::Registry;

/// One router, as seen from its routes.
pub struct App {
    pub registry: Arc<Registry>,
    pub members: Arc<Members>,
    pub client: Client,
    pub metrics: Arc<RouterMetrics>,
    pub traces: Traces,
    pub policy: Policy,
    pub timeouts: Timeouts,
    pub max_body_bytes: usize,
    pub max_retries: u32,
    pub hedge_quantile: Option<f64>,
    pub max_waiting: usize,
    pub budget: Budget,
    pub desk: Desk,
    pub first_bytes: FirstBytes,
    pub hold: Hold,
    pub decisions: Decisions,
    pub limits: Arc<Limits>,
    pub gate: Arc<Gate>,
    pub answers: Arc<Answers>,
    pub unread: Arc<Unread>,
    pub replica_key: Option<HeaderValue>,
    /// Every request from its arrival to the last byte of its answer.
    pub inside: TaskTracker,
    /// Cancelled when the time to drain is over: answers still under way end with an error.
    pub cut: CancellationToken,
    keys: ApiKeys,
    admin: ApiKeys,
    max_in_flight_per_replica: usize,
    draining: AtomicBool,
}

impl App {
    /// # Errors
    /// If a key cannot be used.
    pub fn new(options: &RouterOptions, shared: Option<Shared>) -> Result<Self, UnusableKey> {
        let secrets: Vec<_> = options.keys.iter().map(|key| key.secret.clone()).collect();
        let admin: Vec<_> = options.admin_key.iter().cloned().collect();
        let registry = Arc::new(Registry::new(options.fleet));
        let client = client(options.timeouts.connect);
        let limits: Vec<_> = match options.keys.as_slice() {
            [] => vec![("anonymous".to_owned(), options.anonymous_limits)],
            keys => keys.iter().map(|key| (redis::name_of(&key.secret), key.limits)).collect(),
        };
        let replica_key = options.replica_key.as_ref().map(|key| {
            let mut value = HeaderValue::try_from(format!("Bearer {}", key.expose()));
            value.iter_mut().for_each(|value| value.set_sensitive(true));
            value.map_err(|_| UnusableKey { number: 1 })
        });
        let replica_key = replica_key.transpose()?;
        let watch = Arc::new(Watch {
            registry: registry.clone(),
            client: client.clone(),
            key: replica_key.clone(),
            options: options.parity.clone(),
            tokenisers: Tokenisers::default(),
        });
        let slots = options.max_in_flight_per_replica;
        Ok(Self {
            members: Arc::new(Members::new(
                registry.clone(),
                client.clone(),
                options.probe.clone(),
                options.kv_events.clone(),
                replica_key.clone(),
                watch,
            )),
            client,
            metrics: options.metrics.clone(),
            traces: options.traces.clone(),
            policy: options.fleet.policy,
            timeouts: options.timeouts,
            max_body_bytes: options.max_body_bytes,
            max_retries: options.max_retries,
            hedge_quantile: options.hedge_quantile,
            max_waiting: options.max_waiting,
            // A choice may favour one replica; twice what it should have is what it may take with it.
            budget: Budget::new(slots.saturating_mul(2)),
            desk: Desk::new(options.parity.tokenise_timeout, options.metrics.clone()),
            first_bytes: FirstBytes::default(),
            hold: Hold::new(options.hold, options.metrics.clone()),
            decisions: Decisions::default(),
            limits: Arc::new(Limits::new(limits, shared, registry.now())),
            gate: Arc::new(Gate::new(slots, options.max_waiting)),
            answers: Arc::new(Answers::new(options.idempotency_window)),
            unread: Arc::default(),
            replica_key,
            inside: TaskTracker::new(),
            cut: CancellationToken::new(),
            keys: ApiKeys::new(&secrets)?,
            admin: ApiKeys::new(&admin)?,
            max_in_flight_per_replica: slots,
            draining: AtomicBool::new(false),
            registry,
        })
    }

    /// Whose limits a request counts against: the place of its key, 0 where everybody may come in.
    ///
    /// # Errors
    /// If it presents no key that is known.
    pub fn key(&self, headers: &HeaderMap) -> Result<usize, RouterError> {
        Ok(self.keys.check(headers)?.unwrap_or(0))
    }

    /// # Errors
    /// Unless the request presents the admin key.
    pub fn check_admin(&self, headers: &HeaderMap) -> Result<(), RouterError> {
        if self.admin.is_empty() {
            return Err(RouterError::NoAdmin);
        }
        self.admin.check(headers).map(drop).map_err(|_| RouterError::NotAdmin)
    }

    /// Lets as many requests through as the replicas that are ready should have; without any, as many as one should:
    /// they are held then.
    pub fn set_slots(&self) {
        self.gate.set_slots(self.registry.ready().max(1).saturating_mul(self.max_in_flight_per_replica));
    }

    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}
