//! A name, and every address that it has: a headless service of Kubernetes lists its ready pods in this way. Asked by
//! the system's own resolver, so that its files and search domains hold.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Members;
use crate::replicas::address::Address;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Never returns. A name that cannot be resolved changes nothing: a resolver that is away must not empty the fleet.
pub async fn follow(members: &Members, number: usize, name: &str, port: u16, interval: Duration) {
    let mut before = None;
    loop {
        match tokio::time::timeout(TIMEOUT, resolve(name, port)).await {
            Ok(Ok(addresses)) => {
                if before.as_ref() != Some(&addresses) {
                    members.set(number, addresses.clone());
                    before = Some(addresses);
                }
            }
            Ok(Err(error)) => tracing::warn!(name, %error, "the name cannot be resolved; the replicas stay"),
            Err(_) => tracing::warn!(name, "the resolver does not answer; the replicas stay"),
        }
        tokio::time::sleep(interval).await;
    }
}

async fn resolve(name: &str, port: u16) -> std::io::Result<BTreeSet<Address>> {
    let addresses = tokio::net::lookup_host((name, port)).await?;
    Ok(addresses.filter_map(|address| address.to_string().parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_resolves_to_itself() {
        let [found] =
            resolve("127.0.0.1", 81).await.unwrap().into_iter().collect::<Vec<_>>().try_into().unwrap();
        assert_eq!(found.to_string(), "http://127.0.0.1:81");
        let [found] = resolve("::1", 81).await.unwrap().into_iter().collect::<Vec<_>>().try_into().unwrap();
        assert_eq!(found.authority(), "[::1]:81");
    }
}
