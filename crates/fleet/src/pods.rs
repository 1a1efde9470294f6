//! Pods and the nodes under them: who starts, who is ready, who goes.
//!
//! A pod finds a node with free GPUs or waits for a new one; then it is scheduled, pulls the image if the node has not
//! run one before, loads the weights and warms up. What goes first when the fleet shrinks is what a ReplicaSet takes
//! first: pods that are not ready before those that are, then the youngest (Kubernetes, `ActivePodsWithRanks`).

use std::time::Duration;

use servelab_router::choice::replica_set::ReplicaId;

use crate::replica::{Note, Replica};
use crate::settings::{NodeSettings, PodSettings};

/// A pod's place in the order of creation; never given out again.
pub type PodId = usize;

/// What a starting pod does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Schedule,
    Image,
    Load,
    WarmUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No node has room.
    Pending,
    Starting(Stage),
    Ready,
    /// It is to go, and finishes what it has.
    Draining,
    Gone,
}

pub struct Pod {
    pub phase: Phase,
    /// Counts what happened to it, so that an event made before can be told.
    pub generation: u32,
    pub created: Duration,
    node: Option<usize>,
    node_is_fresh: bool,
    /// When it got its node: from then on its GPUs are paid for.
    placed: Option<Duration>,
    /// Its `status.startTime`: the node has taken it in.
    pub began: Option<Duration>,
    /// Of the container that runs.
    pub container_began: Option<Duration>,
    pub ready_at: Option<Duration>,
    /// When its condition Ready changed last.
    pub readiness_changed: Duration,
    /// While it is ready or drains.
    pub replica: Option<Replica>,
    /// Its place in a router, once a probe has found it.
    pub seat: Option<(usize, ReplicaId)>,
    /// The router does not reach it, and what it says is heard later.
    pub is_cut_off: bool,
    pub unheard: Vec<Note>,
    /// When its next step ends, as the queue of events knows it.
    pub scheduled: Option<Duration>,
    /// Time at work when it was last looked at, for a row and by Prometheus, to tell how busy it was since.
    pub busy_nanos_seen: u64,
    pub busy_nanos_scraped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    free_gpus: u32,
    has_image: bool,
}

/// How many pods are in which phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounts {
    pub pending: u32,
    pub starting: u32,
    pub ready: u32,
    pub draining: u32,
}

impl PodCounts {
    /// Those that the Deployment counts as its own.
    pub fn wanted(self) -> u32 {
        self.pending + self.starting + self.ready
    }
}

/// All pods that there were, and the nodes.
pub struct Pods {
    settings: PodSettings,
    gpus: u32,
    pub pods: Vec<Pod>,
    /// Those that are not gone, oldest first.
    pub alive: Vec<PodId>,
    nodes: Vec<Node>,
    nodes_on_their_way: u32,
    /// GPU time of pods that are gone.
    gone_gpu_seconds: f64,
    pub started: u64,
}

impl Pods {
    pub fn new(settings: PodSettings, gpus: u32) -> Self {
        let NodeSettings { gpus_per_node, initial, .. } = settings.nodes;
        let node = Node { free_gpus: gpus_per_node, has_image: true };
        Self {
            settings,
            gpus,
            pods: Vec::new(),
            alive: Vec::new(),
            nodes: vec![node; initial as usize],
            nodes_on_their_way: 0,
            gone_gpu_seconds: 0.0,
            started: 0,
        }
    }

    pub fn counts(&self) -> PodCounts {
        let mut counts = PodCounts::default();
        for pod in self.alive.iter().map(|pod| &self.pods[*pod]) {
            match pod.phase {
                Phase::Pending => counts.pending += 1,
                Phase::Starting(_) => counts.starting += 1,
                Phase::Ready => counts.ready += 1,
                Phase::Draining => counts.draining += 1,
                Phase::Gone => {}
            }
        }
        counts
    }

    /// A pod that waits for a node.
    pub fn create(&mut self, now: Duration) -> PodId {
        let id = self.pods.len();
        self.pods.push(Pod {
            phase: Phase::Pending,
            generation: 0,
            created: now,
            node: None,
            node_is_fresh: false,
            placed: None,
            began: None,
            container_began: None,
            ready_at: None,
            readiness_changed: now,
            replica: None,
            seat: None,
            is_cut_off: false,
            unheard: Vec::new(),
            scheduled: None,
            busy_nanos_seen: 0,
            busy_nanos_scraped: 0,
        });
        self.alive.push(id);
        id
    }

    /// Gives pending pods the nodes that have room, oldest first, and returns them.
    pub fn place(&mut self, now: Duration) -> Vec<PodId> {
        let mut placed = Vec::new();
        for at in 0..self.alive.len() {
            let id = self.alive[at];
            if self.pods[id].phase != Phase::Pending {
                continue;
            }
            let gpus = self.gpus;
            let Some(node) = self.nodes.iter().position(|node| node.free_gpus >= gpus) else { break };
            self.nodes[node].free_gpus -= gpus;
            let pod = &mut self.pods[id];
            pod.node_is_fresh = !std::mem::replace(&mut self.nodes[node].has_image, true);
            (pod.node, pod.placed) = (Some(node), Some(now));
            pod.phase = Phase::Starting(Stage::Schedule);
            placed.push(id);
        }
        placed
    }

    /// Orders nodes for the pods that have none, and returns how many.
    pub fn order_nodes(&mut self) -> u32 {
        let NodeSettings { gpus_per_node, most, .. } = self.settings.nodes;
        let pods_per_node = (gpus_per_node / self.gpus).max(1);
        let needed = self.counts().pending.div_ceil(pods_per_node);
        let room = most.saturating_sub(self.nodes.len() as u32);
        let ordered = needed.min(room).saturating_sub(self.nodes_on_their_way);
        self.nodes_on_their_way += ordered;
        ordered
    }

    pub fn node_is_there(&mut self) {
        self.nodes_on_their_way = self.nodes_on_their_way.saturating_sub(1);
        self.nodes.push(Node { free_gpus: self.settings.nodes.gpus_per_node, has_image: false });
    }

    /// How long the stage takes that the pod is in.
    pub fn stage_time(&self, id: PodId) -> Duration {
        let stages = &self.settings.stages;
        let pod = &self.pods[id];
        match pod.phase {
            Phase::Starting(Stage::Schedule) => stages.schedule,
            Phase::Starting(Stage::Image) if pod.node_is_fresh => stages.image,
            Phase::Starting(Stage::Load) => stages.load,
            Phase::Starting(Stage::WarmUp) => stages.warm_up,
            Phase::Starting(Stage::Image) | Phase::Pending | Phase::Ready | Phase::Draining | Phase::Gone => {
                Duration::ZERO
            }
        }
    }

    /// From one stage to the next. True when the pod has become ready.
    pub fn next_stage(&mut self, now: Duration, id: PodId) -> bool {
        let pod = &mut self.pods[id];
        pod.phase = match pod.phase {
            Phase::Starting(Stage::Schedule) => Phase::Starting(Stage::Image),
            Phase::Starting(Stage::Image) => Phase::Starting(Stage::Load),
            Phase::Starting(Stage::Load) => Phase::Starting(Stage::WarmUp),
            Phase::Starting(Stage::WarmUp) => Phase::Ready,
            other => other,
        };
        match pod.phase {
            Phase::Starting(Stage::Image) => (pod.began, pod.readiness_changed) = (Some(now), now),
            Phase::Starting(Stage::Load) => pod.container_began = Some(now),
            Phase::Ready => {
                (pod.ready_at, pod.readiness_changed) = (Some(now), now);
                self.started += 1;
            }
            _ => {}
        }
        pod.phase == Phase::Ready
    }

    /// The container of a ready pod died and is started anew, on the same node.
    pub fn restart(&mut self, now: Duration, id: PodId) {
        let pod = &mut self.pods[id];
        pod.phase = Phase::Starting(Stage::Load);
        pod.generation += 1;
        (pod.container_began, pod.ready_at, pod.readiness_changed) = (Some(now), None, now);
        pod.replica = None;
        pod.unheard.clear();
        (pod.is_cut_off, pod.scheduled) = (false, None);
        (pod.busy_nanos_seen, pod.busy_nanos_scraped) = (0, 0);
    }

    /// Who goes first.
    pub fn next_victim(&self) -> Option<PodId> {
        let rank = |pod: &Pod| match pod.phase {
            Phase::Pending => Some(0),
            Phase::Starting(_) => Some(1),
            Phase::Ready => Some(2),
            Phase::Draining | Phase::Gone => None,
        };
        let candidates = self.alive.iter().filter_map(|id| Some((rank(&self.pods[*id])?, *id)));
        // The least rank, and of those the youngest: ready for the shortest time, or made last.
        candidates
            .min_by_key(|(rank, id)| {
                let pod = &self.pods[*id];
                (*rank, std::cmp::Reverse((pod.ready_at, pod.created, *id)))
            })
            .map(|(_, id)| id)
    }

    pub fn drain(&mut self, id: PodId) {
        let pod = &mut self.pods[id];
        pod.phase = Phase::Draining;
        pod.generation += 1;
    }

    pub fn remove(&mut self, now: Duration, id: PodId) {
        let pod = &mut self.pods[id];
        pod.phase = Phase::Gone;
        pod.generation += 1;
        pod.replica = None;
        pod.scheduled = None;
        if let (Some(node), Some(placed)) = (pod.node, pod.placed) {
            self.nodes[node].free_gpus += self.gpus;
            self.gone_gpu_seconds += (now - placed).as_secs_f64() * f64::from(self.gpus);
        }
        self.alive.retain(|other| *other != id);
    }

    /// GPU time that pods have held until now.
    pub fn gpu_seconds(&self, now: Duration) -> f64 {
        let placed = self.alive.iter().filter_map(|id| self.pods[*id].placed);
        let held: f64 = placed.map(|placed| (now - placed).as_secs_f64() * f64::from(self.gpus)).sum();
        self.gone_gpu_seconds + held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::StartStages;

    fn pods(nodes: u32, most: u32) -> Pods {
        let second = Duration::from_secs(1);
        let settings = PodSettings {
            initial: 0,
            stages: StartStages { schedule: second, image: 60 * second, load: second, warm_up: second },
            nodes: NodeSettings { gpus_per_node: 8, initial: nodes, most, start: second },
            termination_grace: second,
        };
        Pods::new(settings, 4)
    }

    #[test]
    fn pods_wait_for_nodes_and_only_a_fresh_node_pulls_the_image() {
        let mut pods = pods(1, 2);
        for _ in 0..5 {
            pods.create(Duration::ZERO);
        }
        assert_eq!(pods.place(Duration::ZERO), [0, 1]);
        assert_eq!((pods.counts().pending, pods.order_nodes(), pods.order_nodes()), (3, 1, 0));
        pods.node_is_there();
        assert_eq!(pods.place(Duration::ZERO), [2, 3]);
        assert_eq!(pods.order_nodes(), 0, "there may be two nodes");
        for (pod, image) in [(0, 0), (2, 60), (3, 0)] {
            assert!(!pods.next_stage(Duration::ZERO, pod));
            assert_eq!(pods.stage_time(pod), Duration::from_secs(image), "pod {pod}");
        }
    }

    #[test]
    fn those_that_are_not_ready_go_first_and_then_the_youngest() {
        let mut pods = pods(2, 2);
        for _ in 0..4 {
            pods.create(Duration::ZERO);
        }
        pods.place(Duration::ZERO);
        for (second, pod) in [(1, 2), (2, 0), (3, 1)] {
            let now = Duration::from_secs(second);
            while !pods.next_stage(now, pod) {}
        }
        let mut gone = Vec::new();
        while let Some(victim) = pods.next_victim() {
            gone.push(victim);
            pods.remove(Duration::from_secs(10), victim);
        }
        assert_eq!(gone, [3, 1, 0, 2]);
        assert_eq!(pods.gpu_seconds(Duration::from_secs(99)), 160.0);
    }
}
