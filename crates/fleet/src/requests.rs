//! What happens to a request: it is sent, routed, held or refused, answered, and ends once.

use std::time::Duration;

use servelab_bench::result::SloMetric;

use crate::outcome::Failure;
use crate::pods::PodId;
use crate::replica::{Ask, Happened, Note, answer_token};
use crate::run::{Active, Event, Run};
use crate::traffic::{Conversation, Load, exponential};

/// Replicas know a request by its number and which attempt it is.
const ATTEMPT_BITS: u32 = 8;

fn attempt_id(number: u64, attempt: u32) -> u64 {
    number << ATTEMPT_BITS | u64::from(attempt)
}

impl Run {
    // ---- sending ----

    /// Puts the next arrival of the open loop into the queue.
    pub(crate) fn next_arrival(&mut self) {
        let next = self.arrivals.as_mut().and_then(Iterator::next);
        match next.filter(|at| *at < self.settings.duration) {
            Some(at) => self.push(at, Event::Arrival),
            None => self.arrivals = None,
        }
    }

    pub(crate) fn arrival(&mut self) {
        if let Some(conversation) = self.next_job() {
            self.send(conversation);
            self.next_arrival();
        } else {
            self.arrivals = None;
        }
    }

    fn next_job(&mut self) -> Option<Conversation> {
        let number = self.next_conversation;
        self.next_conversation += 1;
        Some(Conversation::new(number, self.jobs.next()?))
    }

    /// Users who have been reading for a while when the simulation begins, so that they do not ask all at once.
    pub(crate) fn start_users(&mut self, users: u32, think: Duration) {
        for _ in 0..users {
            let at = exponential(&mut self.think, think);
            self.next_job_at(at);
        }
    }

    fn next_job_at(&mut self, at: Duration) {
        if at < self.settings.duration
            && let Some(conversation) = self.next_job()
        {
            self.pause(at, conversation);
        }
    }

    fn pause(&mut self, until: Duration, conversation: Conversation) {
        let number = conversation.number;
        self.pausing.insert(number, conversation);
        self.push(until, Event::Send(number));
    }

    pub(crate) fn send_paused(&mut self, number: u64) {
        if let Some(conversation) = self.pausing.remove(&number) {
            self.send(conversation);
        }
    }

    fn send(&mut self, mut conversation: Conversation) {
        let output_tokens = conversation.say(&self.writer);
        let number = self.next_request;
        self.next_request += 1;
        let engine = &self.settings.kind.engine;
        let prompt = conversation.history.as_slice().into();
        let ask = Ask::new(number, number, prompt, output_tokens, engine.block_size);
        self.tally.requests += 1;
        self.tally.prompt_tokens += u64::from(ask.prompt_tokens());
        let tokens = u64::from(ask.prompt_tokens()) + u64::from(output_tokens);
        let room = u64::from(engine.num_blocks) * u64::from(engine.block_size);
        let fits = tokens <= u64::from(engine.max_model_len).min(room);
        let cell = self.gateway.cell_of(number);
        let active = Active {
            ask,
            conversation,
            arrived: self.now,
            cell,
            at: None,
            first_token: None,
            attempts: 0,
            held_until: None,
        };
        self.active.insert(number, active);
        if fits { self.route(number) } else { self.fail(number, Failure::TooLarge) }
    }

    // ---- routing ----

    /// Gives a request to a replica, or lets it wait in the router, or refuses it.
    pub(crate) fn route(&mut self, number: u64) {
        let Some(request) = self.active.get(&number) else { return };
        let cell = request.cell;
        let (settings, held) = (self.gateway.settings, self.gateway.held());
        if self.gateway.cells[cell].eligible.is_empty() {
            match held < settings.max_held {
                true => self.hold(number),
                false => self.fail(number, Failure::TooManyHeld),
            }
        } else if !self.gateway.has_room(cell) {
            match self.gateway.waiting() - held < settings.max_waiting {
                true => self.gateway.cells[cell].waiting.push_back(number),
                false => self.fail(number, Failure::TooManyWaiting),
            }
        } else {
            self.dispatch(number);
        }
    }

    fn hold(&mut self, number: u64) {
        let Some(request) = self.active.get_mut(&number) else { return };
        let until = self.now + self.gateway.settings.hold_timeout;
        request.held_until = Some(until);
        self.gateway.cells[request.cell].held.push_back(number);
        self.push(until, Event::HoldTimeout(number));
    }

    pub(crate) fn hold_timed_out(&mut self, number: u64) {
        let Some(request) = self.active.get(&number) else { return };
        let held = &mut self.gateway.cells[request.cell].held;
        let is_due = request.held_until.is_some_and(|until| until <= self.now);
        if let Some(place) = held.iter().position(|other| *other == number).filter(|_| is_due) {
            held.remove(place);
            self.fail(number, Failure::HeldTooLong);
        }
    }

    fn dispatch(&mut self, number: u64) {
        let Some(request) = self.active.get(&number) else { return };
        let session = request.conversation.session();
        let choice = self.gateway.choose(self.now, request.cell, &request.ask, session, &mut self.pods);
        let (Some(choice), Some(request)) = (choice, self.active.get_mut(&number)) else {
            self.fail(number, Failure::NoReplica);
            return;
        };
        let pod = choice.pod;
        request.at = Some((pod, choice.dispatch));
        request.attempts += 1;
        let Some(replica) = &mut self.pods.pods[pod].replica else {
            // Its container has died, and no probe has told yet.
            self.try_again(number, Failure::NoReplica);
            return;
        };
        let ask = Ask { number: attempt_id(number, request.attempts), ..request.ask.clone() };
        if replica.add(self.now, &ask) {
            self.schedule_step(pod);
        } else {
            self.try_again(number, Failure::QueueFull);
        }
    }

    /// Another replica, as long as the client has seen nothing and there are attempts left.
    pub(crate) fn try_again(&mut self, number: u64, failure: Failure) {
        let Some(request) = self.active.get_mut(&number) else { return };
        let is_tried = request.attempts > self.settings.router.max_retries;
        if request.first_token.is_some() || is_tried {
            self.fail(number, failure);
            return;
        }
        if request.at.take().is_some() {
            self.gateway.cells[request.cell].in_flight -= 1;
        }
        self.tally.retries += 1;
        self.route(number);
    }

    /// Somebody has become eligible, or a request has left a replica.
    pub(crate) fn let_in(&mut self, cell: usize) {
        if self.gateway.cells[cell].eligible.is_empty() {
            return;
        }
        for number in std::mem::take(&mut self.gateway.cells[cell].held) {
            self.route(number);
        }
        while self.gateway.has_room(cell)
            && let Some(number) = self.gateway.cells[cell].waiting.pop_front()
        {
            self.dispatch(number);
        }
    }

    // ---- what replicas say ----

    /// Puts the end of the replica's next step into the queue, unless it is there.
    pub(crate) fn schedule_step(&mut self, id: PodId) {
        let pod = &mut self.pods.pods[id];
        let next = pod.replica.as_ref().and_then(crate::replica::Replica::next);
        if next != pod.scheduled {
            pod.scheduled = next;
            if let Some(at) = next {
                self.push(at, Event::Step(id));
            }
        }
    }

    pub(crate) fn step_ended(&mut self, id: PodId) {
        let pod = &mut self.pods.pods[id];
        if pod.scheduled != Some(self.now) {
            return;
        }
        let Some(replica) = &mut pod.replica else { return };
        let mut notes = std::mem::take(&mut self.notes);
        replica.advance(self.now, &mut notes);
        if !pod.is_cut_off {
            self.heard(id, &mut notes);
            self.notes = notes;
        } else {
            // Said into the void, until the network is whole again.
            self.pods.pods[id].unheard.append(&mut notes);
        }
        self.schedule_step(id);
        self.finish_draining(id);
    }

    /// Takes in what a replica says. Leaves `notes` empty.
    pub(crate) fn heard(&mut self, pod: PodId, notes: &mut Vec<Note>) {
        for note in notes.drain(..) {
            let number = note.request >> ATTEMPT_BITS;
            let Some(request) = self.active.get_mut(&number) else { continue };
            // One that was given up and sent again is no longer asked of this pod.
            let is_this = attempt_id(number, request.attempts) == note.request;
            let Some((_, dispatch)) = request.at.as_mut().filter(|_| is_this) else { continue };
            match note.happened {
                Happened::Scheduled { cached_tokens } => {
                    self.tally.hit_tokens += u64::from(cached_tokens);
                    self.tally.looked_up_tokens += u64::from(request.ask.prompt_tokens());
                    self.queue_time.push(request.arrived, note.at.saturating_sub(request.arrived));
                }
                Happened::FirstToken => {
                    dispatch.first_token();
                    request.first_token = Some(self.now);
                    let seconds = (self.now - request.arrived).as_secs_f64();
                    if let Some((cell, replica)) = self.pods.pods[pod].seat {
                        self.gateway.cells[cell].fleet.answered(replica, self.now, seconds);
                    }
                }
                Happened::Preempted => {}
                Happened::Ended => self.complete(number),
            }
        }
    }

    // ---- the end of a request ----

    fn complete(&mut self, number: u64) {
        let Some(request) = self.active.remove(&number) else { return };
        let Active { ask, mut conversation, arrived, first_token, cell, at, .. } = request;
        drop(at);
        self.gateway.cells[cell].in_flight -= 1;
        let first = first_token.unwrap_or(self.now);
        let gaps = ask.output_tokens.saturating_sub(1).max(1);
        let outside = self.outside();
        let (ttft, tpot, e2e) =
            (first - arrived + outside, (self.now - first) / gaps, self.now - arrived + outside);
        self.tally.completed += 1;
        self.tally.output_tokens += u64::from(ask.output_tokens);
        self.ttft.push(arrived, ttft);
        self.tpot.push(arrived, tpot);
        self.e2e.push(arrived, e2e);
        let mut is_good = true;
        for (limit, kept) in self.settings.slo.limits.iter().zip(&mut self.tally.kept) {
            let value = match limit.metric {
                SloMetric::Ttft => ttft,
                SloMetric::Tpot => tpot,
                SloMetric::E2el => e2e,
            };
            let is_kept = value.as_secs_f64() * 1e3 <= limit.limit_ms;
            *kept += u64::from(is_kept);
            is_good &= is_kept;
        }
        self.tally.good += u64::from(is_good);
        match conversation.next_turn() {
            Some(think) => {
                let answer = (0..ask.output_tokens).map(|at| answer_token(ask.answer_key, at));
                conversation.history.extend(answer);
                let at = self.now + outside + think + self.user_thinks();
                if at < self.settings.duration {
                    self.pause(at, conversation);
                }
            }
            None => self.user_goes_on(),
        }
        self.let_in(cell);
    }

    /// What a client waits besides what happens in router and replica.
    fn outside(&self) -> Duration {
        Duration::from_secs_f64(self.settings.kind.cost.request_seconds()) + self.settings.network_time
    }

    pub(crate) fn fail(&mut self, number: u64, failure: Failure) {
        let Some(request) = self.active.remove(&number) else { return };
        if request.at.is_some() {
            self.gateway.cells[request.cell].in_flight -= 1;
        }
        *self.tally.failures.entry(failure).or_default() += 1;
        self.user_goes_on();
    }

    /// Nothing in an open loop.
    fn user_thinks(&mut self) -> Duration {
        match self.settings.load {
            Load::Users { think, .. } => exponential(&mut self.think, think),
            Load::Open(_) => Duration::ZERO,
        }
    }

    /// A user whose job is over begins the next one.
    fn user_goes_on(&mut self) {
        if matches!(self.settings.load, Load::Users { .. }) {
            let at = self.now + self.outside() + self.user_thinks();
            self.next_job_at(at);
        }
    }
}
