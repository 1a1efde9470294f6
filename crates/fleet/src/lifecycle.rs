//! What happens to pods: they start, are found, go, crash, and are cut off.

use std::time::Duration;

use rand::Rng;

use crate::outcome::Failure;
use crate::pods::{Phase, PodId};
use crate::replica::Replica;
use crate::run::{Event, Run};
use crate::settings::SettingsError;
use crate::traffic::exponential;

impl Run {
    /// The pods that are ready when the simulation begins.
    pub(crate) fn start_ready_pods(&mut self) -> Result<(), SettingsError> {
        // A configuration that cannot be shows here, and nowhere later.
        Replica::new(&self.settings.kind, self.settings.is_exact)?;
        for _ in 0..self.settings.pods.initial {
            self.pods.create(Duration::ZERO);
        }
        for id in self.pods.place(Duration::ZERO) {
            while !self.pods.next_stage(Duration::ZERO, id) {}
            self.open(id);
            self.probed(id, self.pods.pods[id].generation);
        }
        self.order_nodes();
        Ok(())
    }

    // ---- more and fewer ----

    /// Asks the autoscaler, and does what it says.
    pub(crate) fn scale(&mut self) {
        let before = self.scaler.wanted();
        let said = self.scaler.tick(self.now, &self.prometheus, &self.metrics_server, &self.pods);
        let wanted = self.scaler.wanted();
        said.into_iter().for_each(|text| self.log(text));
        if wanted != before {
            let direction = if wanted > before { 1 } else { -1 };
            self.tally.scalings += 1;
            self.tally.turns += u64::from(self.tally.last_direction == -direction);
            self.tally.last_direction = direction;
        }
        self.reconcile(wanted);
        if let Some(next) = self.scaler.next_wake() {
            self.push(next.max(self.now + Duration::from_millis(1)), Event::Scale);
        }
    }

    /// What a Deployment does: makes the number of pods what is wanted.
    fn reconcile(&mut self, wanted: u32) {
        let have = self.pods.counts().wanted();
        for _ in have..wanted {
            self.pods.create(self.now);
        }
        for _ in wanted..have {
            let Some(victim) = self.pods.next_victim() else { break };
            if self.pods.pods[victim].phase == Phase::Ready {
                self.drain(victim);
            } else {
                self.remove(victim);
            }
        }
        self.place();
    }

    fn place(&mut self) {
        for id in self.pods.place(self.now) {
            self.next_stage_in(id);
        }
        self.order_nodes();
    }

    fn order_nodes(&mut self) {
        for _ in 0..self.pods.order_nodes() {
            self.push(self.now + self.settings.pods.nodes.start, Event::NodeIsThere);
        }
    }

    pub(crate) fn node_is_there(&mut self) {
        self.pods.node_is_there();
        self.place();
    }

    fn next_stage_in(&mut self, id: PodId) {
        let at = self.now + self.pods.stage_time(id);
        self.push(at, Event::Pod(id, self.pods.pods[id].generation));
    }

    pub(crate) fn pod_is_due(&mut self, id: PodId, generation: u32) {
        let pod = &self.pods.pods[id];
        match pod.phase {
            _ if pod.generation != generation => {}
            Phase::Starting(_) => {
                if self.pods.next_stage(self.now, id) {
                    self.open(id);
                    let seen = self.now + self.settings.router.probe_interval;
                    self.push(seen, Event::Probe(id, generation));
                } else {
                    self.next_stage_in(id);
                }
            }
            Phase::Draining => {
                self.abandon(id, Failure::Terminated);
                self.remove(id);
                self.place();
            }
            Phase::Pending | Phase::Ready | Phase::Gone => {}
        }
    }

    /// The container is ready.
    fn open(&mut self, id: PodId) {
        // The configuration has been tried.
        self.pods.pods[id].replica = Replica::new(&self.settings.kind, self.settings.is_exact).ok();
    }

    /// The router finds a pod that is ready.
    pub(crate) fn probed(&mut self, id: PodId, generation: u32) {
        let pod = &self.pods.pods[id];
        if pod.generation != generation || pod.phase != Phase::Ready || pod.seat.is_some() {
            return;
        }
        let seat = self.gateway.seat(id);
        self.pods.pods[id].seat = seat;
        if let Some((cell, _)) = seat {
            self.let_in(cell);
        }
    }

    fn drain(&mut self, id: PodId) {
        self.pods.drain(id);
        self.close(id);
        let deadline = self.now + self.settings.pods.termination_grace;
        self.push(deadline, Event::Pod(id, self.pods.pods[id].generation));
        self.finish_draining(id);
    }

    /// Lets a pod go that has nothing more to do.
    pub(crate) fn finish_draining(&mut self, id: PodId) {
        let pod = &self.pods.pods[id];
        let is_idle = pod.replica.as_ref().is_none_or(|replica| replica.next().is_none());
        if pod.phase == Phase::Draining && is_idle && pod.unheard.is_empty() {
            self.remove(id);
            self.place();
        }
    }

    fn remove(&mut self, id: PodId) {
        self.leave(id);
        self.pods.remove(self.now, id);
    }

    /// Its place in the router and what it counted.
    fn leave(&mut self, id: PodId) {
        self.close(id);
        let pod = &mut self.pods.pods[id];
        if let Some(replica) = &pod.replica {
            self.tally.preemptions += replica.gauges().preemptions;
        }
        if let Some(seat) = pod.seat.take() {
            self.gateway.unseat(seat);
        }
        self.prometheus.gone(self.now, id);
    }

    /// It gets no more requests.
    fn close(&mut self, id: PodId) {
        let Some(seat) = self.pods.pods[id].seat else { return };
        self.gateway.close(seat);
        let cell = &mut self.gateway.cells[seat.0];
        if cell.eligible.is_empty() {
            // Those that waited for room now wait for a replica.
            for number in std::mem::take(&mut cell.waiting) {
                self.route(number);
            }
        }
    }

    /// Its requests go elsewhere if their clients have seen nothing yet, and fail otherwise.
    fn abandon(&mut self, id: PodId, failure: Failure) {
        let at_pod = |at: &Option<(PodId, _)>| at.as_ref().is_some_and(|(pod, _)| *pod == id);
        let here = self.active.iter().filter(|(_, request)| at_pod(&request.at));
        let numbers: Vec<u64> = here.map(|(number, _)| *number).collect();
        for number in numbers {
            self.try_again(number, failure);
        }
        (0..self.gateway.cells.len()).for_each(|cell| self.let_in(cell));
    }

    // ---- faults ----

    pub(crate) fn next_crash(&mut self) {
        self.next_fault(self.settings.faults.crashes_per_hour, Event::Crash);
    }

    pub(crate) fn next_partition(&mut self) {
        self.next_fault(self.settings.faults.partitions_per_hour, Event::Partition);
    }

    fn next_fault(&mut self, per_hour: f64, event: Event) {
        if per_hour > 0.0 {
            let gap = exponential(&mut self.faults, Duration::from_secs(3600).div_f64(per_hour));
            let at = self.now + gap;
            if at < self.settings.duration {
                self.push(at, event);
            }
        }
    }

    /// One of the ready pods that are reached.
    fn any_ready(&mut self) -> Option<PodId> {
        let pods = &self.pods;
        let is_ready = |id: &&PodId| {
            let pod = &pods.pods[**id];
            pod.phase == Phase::Ready && pod.seat.is_some() && !pod.is_cut_off
        };
        let ready: Vec<PodId> = pods.alive.iter().filter(is_ready).copied().collect();
        (!ready.is_empty()).then(|| ready[self.faults.random_range(0..ready.len())])
    }

    pub(crate) fn crash(&mut self) {
        self.next_crash();
        let Some(id) = self.any_ready() else { return };
        self.tally.crashes += 1;
        self.log(format!("pod {id} crashes"));
        self.leave(id);
        self.pods.restart(self.now, id);
        self.abandon(id, Failure::BrokenOff);
        self.next_stage_in(id);
    }

    pub(crate) fn partition(&mut self) {
        self.next_partition();
        let Some(id) = self.any_ready() else { return };
        self.tally.partitions += 1;
        let seconds = self.settings.faults.partition.as_secs_f64();
        self.log(format!("pod {id} is cut off for {seconds} s"));
        self.close(id);
        let pod = &mut self.pods.pods[id];
        pod.is_cut_off = true;
        pod.generation += 1;
        let generation = pod.generation;
        self.prometheus.gone(self.now, id);
        self.push(self.now + self.settings.faults.partition, Event::Heal(id, generation));
        self.push(self.now + self.settings.router.idle_timeout, Event::GiveUp(id, generation));
    }

    /// Of that generation, or one after it that drains.
    fn is_cut_off(&self, id: PodId, generation: u32) -> bool {
        let pod = &self.pods.pods[id];
        let is_same = pod.generation == generation || pod.phase == Phase::Draining;
        pod.is_cut_off && is_same && pod.phase != Phase::Gone
    }

    pub(crate) fn given_up(&mut self, id: PodId, generation: u32) {
        if self.is_cut_off(id, generation) {
            self.abandon(id, Failure::BrokenOff);
        }
    }

    pub(crate) fn healed(&mut self, id: PodId, generation: u32) {
        if !self.is_cut_off(id, generation) {
            return;
        }
        let pod = &mut self.pods.pods[id];
        pod.is_cut_off = false;
        let mut unheard = std::mem::take(&mut pod.unheard);
        self.heard(id, &mut unheard);
        let pod = &self.pods.pods[id];
        if let Some(seat) = pod.seat.filter(|_| pod.phase == Phase::Ready) {
            self.gateway.reopen(seat);
            self.let_in(seat.0);
        }
        self.finish_draining(id);
    }
}
