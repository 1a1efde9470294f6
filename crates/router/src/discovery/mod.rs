//! Where replicas come from. Each source says which ones it lists now; the router has all that any source lists.

pub mod dns;
pub mod endpoint_slices;
pub mod file;
pub mod kubernetes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderValue;
use tokio_util::sync::CancellationToken;

use self::kubernetes::{KubernetesError, Watched};
use crate::events::{self, KvEventsOptions};
use crate::options::{Dns, Source};
use crate::parity::watch::Watch;
use crate::replicas::address::Address;
use crate::replicas::client::Client;
use crate::replicas::probe::{self, ProbeOptions};
use crate::replicas::registry::{Registry, TooMany};

/// The number of the source that `POST /replicas` adds to.
const ADMIN: usize = usize::MAX;

/// What every source lists.
pub struct Members {
    registry: Arc<Registry>,
    client: Client,
    probe: Arc<ProbeOptions>,
    kv_events: Arc<KvEventsOptions>,
    /// For replicas that ask for one.
    key: Option<HeaderValue>,
    parity: Arc<Watch>,
    listed: Mutex<BTreeMap<usize, BTreeSet<Address>>>,
}

impl Members {
    pub fn new(
        registry: Arc<Registry>,
        client: Client,
        probe: ProbeOptions,
        kv_events: KvEventsOptions,
        key: Option<HeaderValue>,
        parity: Arc<Watch>,
    ) -> Self {
        let (probe, kv_events) = (Arc::new(probe), Arc::new(kv_events));
        Self { registry, client, probe, kv_events, key, parity, listed: Mutex::default() }
    }

    /// The source `number` lists these now, and no others.
    pub fn set(&self, number: usize, addresses: BTreeSet<Address>) {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        let before = listed.insert(number, addresses.clone()).unwrap_or_default();
        for gone in before.difference(&addresses) {
            if !listed.values().any(|list| list.contains(gone)) {
                self.registry.remove(gone);
            }
        }
        for new in addresses.difference(&before) {
            if let Err(error) = self.join(new) {
                tracing::error!(replica = %new, "{error}");
            }
        }
        self.fill_places(&listed);
    }

    /// Adds one by hand. False if it is there already.
    ///
    /// # Errors
    /// If there is no place left.
    pub fn add(&self, address: Address) -> Result<bool, TooMany> {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        let joined = self.join(&address)?;
        listed.entry(ADMIN).or_default().insert(address);
        Ok(joined)
    }

    /// Takes one off by hand, whichever source listed it. One that a file or a name lists comes back when that changes.
    pub fn remove(&self, address: &Address) -> bool {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.values_mut().for_each(|list| {
            list.remove(address);
        });
        let removed = self.registry.remove(address);
        self.fill_places(&listed);
        removed
    }

    /// Those for which there was no place when they were listed may find one now.
    fn fill_places(&self, listed: &BTreeMap<usize, BTreeSet<Address>>) {
        let mut waiting = listed.values().flatten();
        let _ = waiting.try_for_each(|address| self.join(address).map(drop));
    }

    /// Takes it into the registry, asks it from now on how it is and hears what it holds.
    fn join(&self, address: &Address) -> Result<bool, TooMany> {
        let Some(replica) = self.registry.add(address)? else { return Ok(false) };
        let (registry, client) = (self.registry.clone(), self.client.clone());
        tokio::spawn(events::follow(
            registry.clone(),
            replica.clone(),
            client.clone(),
            self.kv_events.clone(),
            self.key.clone(),
        ));
        tokio::spawn(self.parity.clone().follow(replica.clone()));
        tokio::spawn(probe::watch(registry, replica, client, self.probe.clone()));
        Ok(true)
    }
}

/// Sources that can be followed: what each needs for that was found.
pub struct Discovery(Vec<Found>);

enum Found {
    Static(Vec<Address>),
    File(PathBuf),
    Dns(Dns),
    Kubernetes(Box<Watched>),
}

impl Discovery {
    /// Asks nobody yet.
    ///
    /// # Errors
    /// If a service of Kubernetes is to be followed and no cluster is configured here.
    pub async fn find(sources: Vec<Source>) -> Result<Self, KubernetesError> {
        let mut all = Vec::new();
        for source in sources {
            all.push(match source {
                Source::Static(addresses) => Found::Static(addresses),
                Source::File(path) => Found::File(path),
                Source::Dns(dns) => Found::Dns(dns),
                Source::Kubernetes(service) => Found::Kubernetes(Box::new(Watched::new(service).await?)),
            });
        }
        Ok(Self(all))
    }

    /// Follows every source until the router goes down.
    pub fn follow(self, members: &Arc<Members>, down: &CancellationToken) {
        for (number, found) in self.0.into_iter().enumerate() {
            let (members, down) = (members.clone(), down.clone());
            tokio::spawn(async move {
                let following = async {
                    match found {
                        Found::Static(addresses) => members.set(number, addresses.into_iter().collect()),
                        Found::File(path) => file::follow(&members, number, &path).await,
                        Found::Dns(dns) => dns::follow(&members, number, &dns).await,
                        Found::Kubernetes(watched) => kubernetes::follow(&members, number, &watched).await,
                    }
                };
                down.run_until_cancelled(following).await;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::choice::fleet::FleetOptions;
    use crate::choice::policy::Policy;
    use crate::choice::rates::Pace;
    use crate::choice::replica_set::MAX_REPLICAS;
    use crate::parity::tokeniser::Tokenisers;
    use crate::parity::watch::ParityOptions;
    use crate::replicas::client::client;

    pub(super) fn members() -> (Arc<Members>, Arc<Registry>) {
        let registry = Arc::new(Registry::new(FleetOptions {
            policy: Policy::Cost,
            seed: 1,
            index_bytes: 1 << 20,
            block_size: 16,
            prior: Pace::default(),
        }));
        let client = client(Duration::from_millis(100));
        let watch = Arc::new(Watch {
            registry: registry.clone(),
            client: client.clone(),
            key: None,
            options: ParityOptions::default(),
            tokenisers: Tokenisers::default(),
        });
        let (probe, kv_events) = (ProbeOptions::default(), KvEventsOptions::default());
        let members = Members::new(registry.clone(), client, probe, kv_events, None, watch);
        (Arc::new(members), registry)
    }

    fn set(ports: &[u16]) -> BTreeSet<Address> {
        ports.iter().map(|port| format!("127.0.0.1:{port}").parse().unwrap()).collect()
    }

    fn known(registry: &Registry) -> BTreeSet<Address> {
        registry.addresses().into_iter().collect()
    }

    #[tokio::test]
    async fn the_router_has_what_any_source_lists() {
        let (members, registry) = members();
        members.set(0, set(&[1, 2]));
        members.set(1, set(&[2, 3]));
        assert_eq!(known(&registry), set(&[1, 2, 3]));
        members.set(0, set(&[]));
        assert_eq!(known(&registry), set(&[2, 3]), "the other source still lists the second");
        members.set(1, set(&[4]));
        assert_eq!(known(&registry), set(&[4]));
    }

    #[tokio::test]
    async fn one_that_found_no_place_joins_when_there_is_one() {
        let (members, registry) = members();
        let ports: Vec<u16> = (1..=u16::try_from(MAX_REPLICAS).unwrap() + 1).collect();
        members.set(0, set(&ports));
        assert_eq!(known(&registry).len(), MAX_REPLICAS);
        let gone = known(&registry).pop_first().unwrap();
        let left: BTreeSet<Address> = set(&ports).into_iter().filter(|address| *address != gone).collect();
        members.set(0, left.clone());
        assert_eq!(known(&registry), left);
        // Wherever the place comes from.
        members.set(1, set(&[9999]));
        assert_eq!(known(&registry), left);
        let gone = left.first().unwrap();
        assert!(members.remove(gone));
        assert!(known(&registry).is_superset(&set(&[9999])) && !known(&registry).contains(gone));
    }

    #[tokio::test]
    async fn by_hand_one_is_added_and_removed_whoever_lists_it() {
        let (members, registry) = members();
        members.set(0, set(&[1]));
        let [two] = set(&[2]).into_iter().collect::<Vec<_>>().try_into().unwrap();
        assert_eq!((members.add(two.clone()), members.add(two.clone())), (Ok(true), Ok(false)));
        let [one] = set(&[1]).into_iter().collect::<Vec<_>>().try_into().unwrap();
        assert!(members.remove(&one) && members.remove(&two) && !members.remove(&two));
        assert!(registry.is_empty());
        members.set(0, set(&[1]));
        assert_eq!(known(&registry), set(&[1]), "its source lists it anew");
    }
}
