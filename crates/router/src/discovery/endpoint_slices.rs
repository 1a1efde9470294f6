//! What the EndpointSlices of a service say about its replicas. Plain data: no clock and no network.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::runtime::watcher::Event;

use crate::options::ServicePort;
use crate::replicas::address::Address;

/// The slices of one service by name, as they were last seen.
#[derive(Debug, Default)]
pub struct Slices {
    current: BTreeMap<String, EndpointSlice>,
    /// A list that is on its way; until all of it is there, the last one holds.
    coming: Option<BTreeMap<String, EndpointSlice>>,
}

impl Slices {
    /// Takes over what was seen. True if the current slices may be others now.
    pub fn apply(&mut self, event: Event<EndpointSlice>) -> bool {
        let name = |slice: &EndpointSlice| slice.metadata.name.clone().unwrap_or_default();
        match event {
            Event::Init => {
                self.coming = Some(BTreeMap::new());
                return false;
            }
            Event::InitApply(slice) => {
                self.coming.get_or_insert_default().insert(name(&slice), slice);
                return false;
            }
            Event::InitDone => self.current = self.coming.take().unwrap_or_default(),
            Event::Apply(slice) => drop(self.current.insert(name(&slice), slice)),
            Event::Delete(slice) => drop(self.current.remove(&name(&slice))),
        }
        true
    }

    /// Where new requests may go, and what had no such port. A pod that is in several slices, on its way from one to
    /// the other or with an address of each family, is one replica; its IPv4 address is taken.
    pub fn addresses(&self, port: &ServicePort) -> (BTreeSet<Address>, Unlisted) {
        let mut replicas: BTreeMap<String, Address> = BTreeMap::new();
        let mut unlisted = Unlisted::default();
        for family in ["IPv4", "IPv6"] {
            // A service without pods has one slice without endpoints, and that has no ports: nothing is left out there.
            let filled = self.current.values().filter(|slice| !slice.endpoints.is_empty());
            for slice in filled.filter(|slice| slice.address_type == family) {
                let found = slice.endpoints.iter().filter(|endpoint| may_get_requests(endpoint));
                let ip = |endpoint: &Endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok();
                let Some(number) = number(slice, port) else {
                    unlisted.add(slice, found.count());
                    continue;
                };
                if matches!(port, ServicePort::Number(_)) && !has_port(slice, number) {
                    unlisted.add(slice, 0);
                }
                for (endpoint, ip) in found.filter_map(|endpoint| Some((endpoint, ip(endpoint)?))) {
                    if let Ok(address) = SocketAddr::new(ip, number).to_string().parse() {
                        replicas.entry(identity(endpoint, ip)).or_insert(address);
                    }
                }
            }
        }
        (replicas.into_values().collect(), unlisted)
    }
}

/// A pod that ends gets nothing new and may finish what it has; one that is not ready gets nothing yet. With
/// `publishNotReadyAddresses` Kubernetes calls all of them ready, and the router's own checks decide.
fn may_get_requests(endpoint: &Endpoint) -> bool {
    let Some(conditions) = &endpoint.conditions else { return true };
    conditions.ready.unwrap_or(true) && !conditions.terminating.unwrap_or(false)
}

/// The pod, or where there is none its address.
fn identity(endpoint: &Endpoint, ip: IpAddr) -> String {
    let pod = endpoint.target_ref.as_ref().and_then(|pod| pod.uid.clone());
    pod.unwrap_or_else(|| ip.to_string())
}

fn number(slice: &EndpointSlice, port: &ServicePort) -> Option<u16> {
    let name = match port {
        ServicePort::Number(number) => return Some(*number),
        ServicePort::Name(name) => name,
    };
    let ports = slice.ports.iter().flatten();
    let named = ports.filter(|port| port.name.as_ref() == Some(name)).find_map(|port| port.port);
    named.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0)
}

/// Whether the slice lists that port of its pods, or none at all.
fn has_port(slice: &EndpointSlice, number: u16) -> bool {
    let mut ports = slice.ports.iter().flatten().filter_map(|port| port.port).peekable();
    ports.peek().is_none() || ports.any(|port| port == i32::from(number))
}

/// Slices that do not list the port that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unlisted {
    endpoints: usize,
    ports: BTreeSet<(String, i32)>,
    any: bool,
}

impl Unlisted {
    pub fn is_empty(&self) -> bool {
        !self.any
    }

    fn add(&mut self, slice: &EndpointSlice, endpoints: usize) {
        self.any = true;
        self.endpoints += endpoints;
        let ports = slice.ports.iter().flatten();
        self.ports.extend(
            ports.filter_map(|port| Some((port.name.clone().unwrap_or_default(), port.port?))).take(16),
        );
    }
}

impl fmt::Display for Unlisted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "no such port is in the EndpointSlices, {} replicas are left out; it has",
            self.endpoints
        )?;
        if self.ports.is_empty() {
            return write!(formatter, " none");
        }
        self.ports.iter().try_for_each(|(name, number)| write!(formatter, " {name:?}={number}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A slice as the API server writes it: endpoints of address, conditions and pod.
    fn slice(name: &str, family: &str, ports: Value, endpoints: &[(&str, Value, &str)]) -> EndpointSlice {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(address, conditions, pod)| {
                let target = (!pod.is_empty()).then(|| json!({"kind": "Pod", "name": pod, "uid": pod}));
                json!({"addresses": [address], "conditions": conditions, "targetRef": target})
            })
            .collect();
        serde_json::from_value(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": name},
            "addressType": family, "ports": ports, "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn listed(slices: Vec<EndpointSlice>) -> Slices {
        let mut all = Slices::default();
        assert!(!all.apply(Event::Init));
        slices.into_iter().for_each(|slice| assert!(!all.apply(Event::InitApply(slice))));
        assert!(all.apply(Event::InitDone));
        all
    }

    fn names(slices: &Slices, port: &str) -> Vec<String> {
        let (addresses, _) = slices.addresses(&port.parse().unwrap());
        addresses.iter().map(|address| address.authority().to_owned()).collect()
    }

    fn http() -> Value {
        json!([{"name": "http", "port": 8000, "protocol": "TCP"}, {"name": "metrics", "port": 9000}])
    }

    #[test]
    fn conditions_say_who_gets_requests() {
        let slices = listed(vec![slice(
            "a",
            "IPv4",
            http(),
            &[
                ("10.0.0.1", json!({"ready": true, "serving": true, "terminating": false}), "ready"),
                ("10.0.0.2", json!({}), "says-nothing"),
                ("10.0.0.3", json!({"ready": false, "serving": false}), "starts"),
                ("10.0.0.4", json!({"ready": false, "serving": true, "terminating": true}), "drains"),
                (
                    "10.0.0.5",
                    json!({"ready": true, "serving": true, "terminating": true}),
                    "published-drains",
                ),
            ],
        )]);
        assert_eq!(names(&slices, "http"), ["10.0.0.1:8000", "10.0.0.2:8000"]);
    }

    #[test]
    fn ports_are_found_by_name_and_taken_by_number_and_a_wrong_one_is_told() {
        let slices = listed(vec![slice("a", "IPv4", http(), &[("10.0.0.1", json!({}), "one")])]);
        assert_eq!(names(&slices, "metrics"), ["10.0.0.1:9000"]);
        assert_eq!(names(&slices, "8000"), ["10.0.0.1:8000"]);
        let (none, told) = slices.addresses(&"grpc".parse().unwrap());
        assert!(none.is_empty());
        assert_eq!(
            told.to_string(),
            "no such port is in the EndpointSlices, 1 replicas are left out; it has \"http\"=8000 \"metrics\"=9000"
        );
        let (taken, told) = slices.addresses(&"80".parse().unwrap());
        assert_eq!(
            (taken.len(), told.is_empty()),
            (1, false),
            "a container may listen where no service points"
        );
        assert!(slices.addresses(&"http".parse().unwrap()).1.is_empty());
    }

    #[test]
    fn a_service_without_pods_leaves_nothing_out() {
        let slices = listed(vec![slice("a", "IPv4", Value::Null, &[])]);
        for port in ["http", "8000"] {
            let (none, told) = slices.addresses(&port.parse().unwrap());
            assert!(none.is_empty() && told.is_empty(), "{told}");
        }
    }

    #[test]
    fn one_pod_is_one_replica_in_however_many_slices() {
        let one = ("10.0.0.1", json!({}), "one");
        let slices = listed(vec![
            slice("a", "IPv4", http(), std::slice::from_ref(&one)),
            slice("b", "IPv4", http(), &[one, ("10.0.0.2", json!({}), "two")]),
            slice("c", "IPv6", http(), &[("fd00::1", json!({}), "one"), ("fd00::3", json!({}), "three")]),
            slice("d", "FQDN", http(), &[("example.org", json!({}), "")]),
            slice("e", "IPv4", http(), &[("not an address", json!({}), "")]),
        ]);
        assert_eq!(names(&slices, "http"), ["10.0.0.1:8000", "10.0.0.2:8000", "[fd00::3]:8000"]);
    }

    #[test]
    fn a_list_holds_until_the_next_one_is_whole() {
        let with = |name: &str, address: &str| slice(name, "IPv4", http(), &[(address, json!({}), "")]);
        let mut slices = listed(vec![with("a", "10.0.0.1")]);
        slices.apply(Event::Init);
        slices.apply(Event::InitApply(with("b", "10.0.0.2")));
        assert_eq!(names(&slices, "http"), ["10.0.0.1:8000"]);
        slices.apply(Event::InitDone);
        assert_eq!(names(&slices, "http"), ["10.0.0.2:8000"]);
        slices.apply(Event::Apply(with("c", "10.0.0.3")));
        slices.apply(Event::Delete(with("b", "10.0.0.2")));
        assert_eq!(names(&slices, "http"), ["10.0.0.3:8000"]);
    }
}
