//! The routers in front of the replicas: the real choice over the replicas that each knows, and the queues of requests
//! that wait in it.
//!
//! A router knows 256 replicas at most. A larger fleet is cut into cells of one router each, and requests go to them in
//! turn.

use std::collections::VecDeque;
use std::time::Duration;

use servelab_bench::prompt::mix;
use servelab_router::choice::fleet::{Fleet, FleetOptions, Prompt};
use servelab_router::choice::index::Matches;
use servelab_router::choice::load::Dispatch;
use servelab_router::choice::rates::Pace;
use servelab_router::choice::replica_set::{MAX_REPLICAS, ReplicaId, ReplicaSet};

use crate::pods::{PodId, Pods};
use crate::replica::{Ask, ReplicaKind};
use crate::settings::RouterSettings;

/// One router.
pub struct Cell {
    pub fleet: Fleet,
    /// May get requests.
    pub eligible: ReplicaSet,
    /// Whose place is which.
    pods: Vec<Option<PodId>>,
    /// Requests that wait because nobody is ready, oldest first.
    pub held: VecDeque<u64>,
    /// Requests that wait because the replicas have as many as they may.
    pub waiting: VecDeque<u64>,
    pub in_flight: usize,
}

pub struct Gateway {
    pub settings: RouterSettings,
    pub cells: Vec<Cell>,
    block_size: u32,
    capacity_tokens: u64,
}

/// Where a request goes, and what the router expects it to find there.
pub struct Choice {
    pub pod: PodId,
    pub dispatch: Dispatch,
    pub matched_tokens: u32,
}

impl Gateway {
    /// Routers for up to `most_pods`.
    pub fn new(settings: RouterSettings, kind: &ReplicaKind, most_pods: u32, seed: u64) -> Self {
        let block_size = kind.engine.block_size;
        let cell = |number: u32| Cell {
            fleet: Fleet::new(FleetOptions {
                policy: settings.policy,
                seed: mix(seed ^ u64::from(number)),
                index_bytes: settings.index_bytes,
                block_size,
                prior: Pace::default(),
            }),
            eligible: ReplicaSet::EMPTY,
            pods: vec![None; MAX_REPLICAS],
            held: VecDeque::new(),
            waiting: VecDeque::new(),
            in_flight: 0,
        };
        let cells = most_pods.div_ceil(MAX_REPLICAS as u32).max(1);
        Self {
            settings,
            cells: (0..cells).map(cell).collect(),
            block_size,
            capacity_tokens: u64::from(kind.engine.num_blocks) * u64::from(block_size),
        }
    }

    /// The cell of a new request.
    pub fn cell_of(&self, request: u64) -> usize {
        (request % self.cells.len() as u64) as usize
    }

    /// A probe has found the pod ready: it gets a place, in the router with the fewest. `None` if none has room.
    pub fn seat(&mut self, pod: PodId) -> Option<(usize, ReplicaId)> {
        let fewest =
            (0..self.cells.len()).min_by_key(|cell| self.cells[*cell].fleet.replicas().iter().count())?;
        let cell = &mut self.cells[fewest];
        let replica = cell.fleet.add(mix(pod as u64))?;
        cell.fleet.set_capacity(replica, self.capacity_tokens);
        cell.eligible.insert(replica);
        cell.pods[usize::from(replica.0)] = Some(pod);
        Some((fewest, replica))
    }

    /// The pod gets no more requests.
    pub fn close(&mut self, (cell, replica): (usize, ReplicaId)) {
        self.cells[cell].eligible.remove(replica);
    }

    pub fn reopen(&mut self, (cell, replica): (usize, ReplicaId)) {
        self.cells[cell].eligible.insert(replica);
    }

    /// The pod is gone.
    pub fn unseat(&mut self, (cell, replica): (usize, ReplicaId)) {
        let cell = &mut self.cells[cell];
        cell.eligible.remove(replica);
        cell.fleet.remove(replica);
        cell.pods[usize::from(replica.0)] = None;
    }

    /// Whether the replicas of the cell may have one request more.
    pub fn has_room(&self, cell: usize) -> bool {
        let cell = &self.cells[cell];
        cell.in_flight < cell.eligible.iter().count() * self.settings.max_in_flight_per_replica
    }

    /// Chooses a replica for a request and counts it there. `None` if nobody is eligible.
    pub fn choose(
        &mut self,
        now: Duration,
        cell: usize,
        ask: &Ask,
        session: Option<u64>,
        pods: &mut Pods,
    ) -> Option<Choice> {
        let is_read = self.settings.policy.reads_prompt() || self.settings.is_oracle;
        let chain = if is_read { ask.prompt_chain(self.block_size).to_vec() } else { Vec::new() };
        let prompt = Prompt {
            tokens: ask.prompt_tokens(),
            chain,
            is_exact: true,
            session,
            sequences: 1,
            output_tokens: ask.output_tokens,
            ..Prompt::default()
        };
        let cell = &mut self.cells[cell];
        let decision = match self.settings.is_oracle {
            false => cell.fleet.decide(now, &prompt, &cell.eligible),
            true => {
                let matches = true_matches(cell, ask, now, self.block_size, pods);
                cell.fleet.decide_with(now, &prompt, &cell.eligible, &matches)
            }
        }?;
        let matched_tokens = decision.terms().map_or(0, |terms| terms.matched_tokens);
        let pod = cell.pods[usize::from(decision.replica.0)]?;
        let dispatch = cell.fleet.dispatch(decision.replica, &prompt, matched_tokens)?;
        cell.in_flight += 1;
        Some(Choice { pod, dispatch, matched_tokens })
    }

    /// What the routers read of the replicas that they reach.
    pub fn scrape(&mut self, now: Duration, pods: &mut Pods) {
        for cell in &mut self.cells {
            for replica in cell.fleet.replicas().iter() {
                let Some(pod) = cell.pods[usize::from(replica.0)] else { continue };
                let pod = &mut pods.pods[pod];
                let Some(computes) = pod.replica.as_mut().filter(|_| !pod.is_cut_off) else { continue };
                computes.sync(now);
                let (report, counters) = computes.report(now);
                cell.fleet.report(replica, Some(report));
                cell.fleet.observe(replica, counters);
            }
        }
    }

    pub fn held(&self) -> usize {
        self.cells.iter().map(|cell| cell.held.len()).sum()
    }

    /// Held ones among them.
    pub fn waiting(&self) -> usize {
        self.held() + self.cells.iter().map(|cell| cell.waiting.len()).sum::<usize>()
    }

    pub fn in_flight(&self) -> usize {
        self.waiting() + self.cells.iter().map(|cell| cell.in_flight).sum::<usize>()
    }
}

/// What every cache of the cell holds of a request.
fn true_matches(cell: &Cell, ask: &Ask, now: Duration, block_size: u32, pods: &mut Pods) -> Matches {
    let mut matches = Matches::default();
    for replica in cell.eligible.iter() {
        let pod = cell.pods[usize::from(replica.0)];
        if let Some(computes) = pod.and_then(|pod| pods.pods[pod].replica.as_mut()) {
            computes.sync(now);
            matches.set(replica, computes.cached_tokens(ask) / block_size);
        }
    }
    matches
}
