//! The trace of one request, as the code that serves it sees it.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Event, Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, Tracer,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderInjector;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::Span;

use super::Started;

/// The span of a request. Copies are the same span, which ends when the last of them is dropped. The default is that of
/// a request that is not traced, of which nothing is ever recorded.
///
/// All times are counted from the request's beginning.
#[derive(Clone, Default)]
pub struct RequestTrace(Option<Arc<Request>>);

struct Request {
    started: Arc<Started>,
    began: Instant,
    began_at: SystemTime,
    /// Holds the span as the parent of others.
    context: Context,
    id: String,
    is_recorded: bool,
    has_error: AtomicBool,
    span: Mutex<Span>,
}

/// A part of a request that is over.
pub struct Child {
    pub name: &'static str,
    pub from: Duration,
    pub to: Duration,
    pub attributes: Vec<KeyValue>,
    /// When, and what.
    pub events: Vec<(Duration, &'static str, Vec<KeyValue>)>,
}

/// A part of a request that goes on, until it is dropped.
pub struct OpenSpan {
    request: RequestTrace,
    span: Option<Span>,
}

impl RequestTrace {
    pub(super) fn begin(started: Arc<Started>, name: String, kind: SpanKind, parent: &Context) -> Self {
        let (began, began_at) = (Instant::now(), SystemTime::now());
        let builder = SpanBuilder::from_name(name).with_kind(kind).with_start_time(began_at);
        let span = started.tracer.build_with_context(builder, parent);
        let own: SpanContext = span.span_context().clone();
        let request = Request {
            started,
            began,
            began_at,
            id: own.trace_id().to_string(),
            is_recorded: span.is_recording(),
            has_error: AtomicBool::new(false),
            context: Context::new().with_remote_span_context(own),
            span: Mutex::new(span),
        };
        Self(Some(Arc::new(request)))
    }

    /// The trace's id in hexadecimal, also of one that is not sampled.
    pub fn id(&self) -> Option<&str> {
        self.0.as_ref().map(|request| request.id.as_str())
    }

    /// The trace's id, if there will be something under it.
    pub fn recorded_id(&self) -> Option<&str> {
        self.recorded().map(|request| request.id.as_str())
    }

    /// Whether anything is recorded; what only a trace needs is not worth making otherwise.
    pub fn is_recorded(&self) -> bool {
        self.recorded().is_some()
    }

    /// Whether the text of prompts is wanted.
    pub fn wants_prompts(&self) -> bool {
        self.recorded().is_some_and(|request| request.started.prompts)
    }

    /// How long ago the request began; zero if it is not traced.
    pub fn elapsed(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |request| request.began.elapsed())
    }

    /// What is known only when the request has been read.
    pub fn rename(&self, name: String) {
        if let Some(request) = self.recorded() {
            request.span().update_name(name);
        }
    }

    pub fn set(&self, attributes: impl IntoIterator<Item = KeyValue>) {
        if let Some(request) = self.recorded() {
            request.span().set_attributes(attributes);
        }
    }

    /// The request came to nothing, and not by its client's fault; `kind` is a word of a closed set.
    pub fn fail(&self, kind: &'static str) {
        if let Some(request) = self.recorded() {
            request.span().set_status(Status::error(kind));
            self.set_error_type(kind);
        }
    }

    /// Why the request came to nothing, where the span is none that failed. What was said first stands.
    pub fn set_error_type(&self, kind: impl Into<Cow<'static, str>>) {
        if let Some(request) = self.recorded()
            && !request.has_error.swap(true, Ordering::AcqRel)
        {
            request.span().set_attribute(KeyValue::new("error.type", kind.into()));
        }
    }

    pub fn event(&self, when: Duration, name: &'static str, attributes: Vec<KeyValue>) {
        if let Some(request) = self.recorded() {
            request.span().add_event_with_timestamp(name, request.at(when), attributes);
        }
    }

    /// Adds a part that is over.
    pub fn child(&self, child: Child) {
        let Some(request) = self.recorded() else { return };
        let events = child.events.into_iter();
        let events = events.map(|(when, name, attributes)| Event::new(name, request.at(when), attributes, 0));
        let builder = SpanBuilder::from_name(child.name)
            .with_kind(SpanKind::Internal)
            .with_start_time(request.at(child.from))
            .with_attributes(child.attributes)
            .with_events(events.collect());
        let mut span = request.started.tracer.build_with_context(builder, &request.context);
        span.end_with_timestamp(request.at(child.to.max(child.from)));
    }

    /// Begins a part that goes on.
    pub fn open(&self, name: &'static str, kind: SpanKind, attributes: Vec<KeyValue>) -> OpenSpan {
        let span = self.recorded().map(|request| {
            let builder = SpanBuilder::from_name(name)
                .with_kind(kind)
                .with_start_time(request.now())
                .with_attributes(attributes);
            request.started.tracer.build_with_context(builder, &request.context)
        });
        OpenSpan { request: self.clone(), span }
    }

    /// Writes the request's own context into headers that go on to another service, in place of the one that it came
    /// with. Not traced, it passes as it is.
    pub fn inject(&self, headers: &mut HeaderMap) {
        if let Some(request) = &self.0 {
            inject(&request.context, headers);
        }
    }

    fn recorded(&self) -> Option<&Request> {
        self.0.as_deref().filter(|request| request.is_recorded)
    }
}

impl Request {
    fn span(&self) -> MutexGuard<'_, Span> {
        self.span.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock on the wall, as it would be had nobody set it since the request began.
    fn at(&self, since: Duration) -> SystemTime {
        self.began_at + since
    }

    fn now(&self) -> SystemTime {
        self.at(self.began.elapsed())
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let now = self.now();
        self.span.get_mut().unwrap_or_else(PoisonError::into_inner).end_with_timestamp(now);
    }
}

impl OpenSpan {
    pub fn set(&mut self, attributes: impl IntoIterator<Item = KeyValue>) {
        if let Some(span) = &mut self.span {
            span.set_attributes(attributes);
        }
    }

    /// It came to nothing; `kind` is a word of a closed set.
    pub fn fail(&mut self, kind: &'static str) {
        if let Some(span) = &mut self.span {
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(kind));
        }
    }

    pub fn event(&mut self, name: &'static str, attributes: Vec<KeyValue>) {
        if let (Some(span), Some(request)) = (&mut self.span, &self.request.0) {
            span.add_event_with_timestamp(name, request.now(), attributes);
        }
    }

    /// Writes this span's context into headers, so that who gets them goes on below it; where nothing is recorded,
    /// that of the request.
    pub fn inject(&self, headers: &mut HeaderMap) {
        match &self.span {
            Some(span) => {
                inject(&Context::new().with_remote_span_context(span.span_context().clone()), headers)
            }
            None => self.request.inject(headers),
        }
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        if let (Some(span), Some(request)) = (&mut self.span, &self.request.0) {
            span.end_with_timestamp(request.now());
        }
    }
}

fn inject(context: &Context, headers: &mut HeaderMap) {
    headers.remove("tracestate");
    TraceContextPropagator::new().inject_context(context, &mut HeaderInjector(headers));
    if headers.get("tracestate").is_some_and(http::HeaderValue::is_empty) {
        headers.remove("tracestate");
    }
}
