//! Where replicas come from. Each source says which ones it lists now; the router has all that any source lists.

pub mod dns;
pub mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::options::Source;
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
    parity: Arc<Watch>,
    listed: Mutex<BTreeMap<usize, BTreeSet<Address>>>,
}

impl Members {
    pub fn new(registry: Arc<Registry>, client: Client, probe: ProbeOptions, parity: Arc<Watch>) -> Self {
        Self { registry, client, probe: Arc::new(probe), parity, listed: Mutex::default() }
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
        self.registry.remove(address)
    }

    /// Takes it into the registry and asks it from now on how it is.
    fn join(&self, address: &Address) -> Result<bool, TooMany> {
        let Some(replica) = self.registry.add(address)? else { return Ok(false) };
        tokio::spawn(self.parity.clone().follow(replica.clone()));
        tokio::spawn(probe::watch(self.registry.clone(), replica, self.client.clone(), self.probe.clone()));
        Ok(true)
    }
}

/// Follows every source until the router goes down.
pub fn follow(members: &Arc<Members>, sources: Vec<Source>, down: &CancellationToken) {
    for (number, source) in sources.into_iter().enumerate() {
        let (members, down) = (members.clone(), down.clone());
        match source {
            Source::Static(addresses) => members.set(number, addresses.into_iter().collect()),
            Source::File(path) => drop(tokio::spawn(async move {
                down.run_until_cancelled(file::follow(&members, number, &path)).await;
            })),
            Source::Dns { name, port, interval } => drop(tokio::spawn(async move {
                down.run_until_cancelled(dns::follow(&members, number, &name, port, interval)).await;
            })),
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
        (Arc::new(Members::new(registry.clone(), client, ProbeOptions::default(), watch)), registry)
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
