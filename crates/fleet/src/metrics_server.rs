//! metrics-server: the CPU that each pod used, read from its node at an interval (`pkg/storage/pod.go` of
//! metrics-server 0.8). It stands beside Prometheus, and what it reads is what an autoscaler on CPU sees.
//!
//! A core launches steps while the device computes them, and a replica asks for one core: so a replica that computes
//! all the time uses 100 % of what it asks for.

use std::collections::BTreeMap;
use std::time::Duration;

use servelab_sim::autoscale::CpuUsage;

use crate::pods::{Pod, PodId, Pods};

/// `--metric-resolution` as its manifests set it.
pub const RESOLUTION: Duration = Duration::from_secs(15);
/// Younger containers are not judged by the time since they began.
const YOUNGEST: Duration = Duration::from_secs(10);

/// What a container has used since it began, at a moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Duration,
    used: Duration,
}

/// The last two looks at a container.
#[derive(Clone, Copy, Debug)]
struct Looks {
    began: Duration,
    last: Look,
    before: Option<Look>,
}

/// The usage of all pods.
#[derive(Debug, Default)]
pub struct MetricsServer {
    looks: BTreeMap<PodId, Looks>,
}

impl MetricsServer {
    /// Reads every container that runs.
    pub fn scrape(&mut self, now: Duration, pods: &mut Pods) {
        let before = std::mem::take(&mut self.looks);
        for id in &pods.alive {
            let pod = &mut pods.pods[*id];
            let Some(began) = pod.container_began else { continue };
            let last = Look { at: now, used: used(now, pod) };
            let age = now - began;
            let before = match before.get(id).filter(|looks| looks.began == began) {
                _ if age < RESOLUTION && age >= YOUNGEST => Some(Look { at: began, used: Duration::ZERO }),
                looks => looks.map(|looks| looks.last),
            };
            self.looks.insert(*id, Looks { began, last, before });
        }
    }

    /// `None` for a pod that has neither been looked at twice nor been at the right age for a single look.
    pub fn usage(&self, pod: PodId) -> Option<CpuUsage> {
        let Looks { last, before, .. } = self.looks.get(&pod)?;
        let before = before.as_ref()?;
        let window = last.at - before.at;
        let used = last.used.saturating_sub(before.used);
        Some(CpuUsage { at: last.at, window, percent: 100.0 * used.as_secs_f64() / window.as_secs_f64() })
    }
}

/// While it loads and warms up it waits for the disk and the device.
fn used(now: Duration, pod: &mut Pod) -> Duration {
    let Some(replica) = &mut pod.replica else { return Duration::ZERO };
    replica.sync(now);
    Duration::from_nanos(replica.counters().busy_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{NodeSettings, PodSettings, StartStages};

    const SECOND: Duration = Duration::from_secs(1);

    fn one_pod() -> Pods {
        let nodes = NodeSettings { gpus_per_node: 1, initial: 1, most: 1, start: SECOND };
        let stages = StartStages { schedule: SECOND, image: SECOND, load: SECOND, warm_up: SECOND };
        let mut pods = Pods::new(PodSettings { initial: 0, stages, nodes, termination_grace: SECOND }, 1);
        pods.create(Duration::ZERO);
        pods.place(Duration::ZERO);
        pods
    }

    fn begin(pods: &mut Pods, second: u32) {
        while pods.pods[0].container_began.is_none() {
            pods.next_stage(second * SECOND, 0);
        }
    }

    #[test]
    fn a_container_has_a_usage_once_it_was_looked_at_twice() {
        let (mut pods, mut server) = (one_pod(), MetricsServer::default());
        server.scrape(SECOND, &mut pods);
        begin(&mut pods, 10);
        for (second, usage) in [(15, None), (30, Some((30, 15))), (45, Some((45, 15)))] {
            server.scrape(second * SECOND, &mut pods);
            let found = server.usage(0).map(|usage| (usage.at, usage.window));
            assert_eq!(found, usage.map(|(at, window)| (at * SECOND, window * SECOND)), "at {second} s");
        }
    }

    #[test]
    fn a_container_of_ten_seconds_is_judged_by_its_whole_life() {
        let (mut pods, mut server) = (one_pod(), MetricsServer::default());
        begin(&mut pods, 3);
        server.scrape(15 * SECOND, &mut pods);
        assert_eq!(server.usage(0), Some(CpuUsage { at: 15 * SECOND, window: 12 * SECOND, percent: 0.0 }));
    }

    #[test]
    fn what_was_seen_of_a_container_before_it_began_anew_is_forgotten() {
        let (mut pods, mut server) = (one_pod(), MetricsServer::default());
        begin(&mut pods, 10);
        for second in [15, 30] {
            server.scrape(second * SECOND, &mut pods);
        }
        pods.restart(38 * SECOND, 0);
        server.scrape(45 * SECOND, &mut pods);
        assert_eq!(server.usage(0), None);
    }
}
