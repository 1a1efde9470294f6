//! Replicas in the domain name system: every address of a name, as a headless service of Kubernetes lists its ready
//! pods, or every service that a name's SRV records tell, host and port.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;

use super::Members;
use crate::choice::replica_set::MAX_REPLICAS;
use crate::options::{Dns, Question};
use crate::replicas::address::Address;

/// How long all of an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long one server may take, before the next one is asked.
const SERVER_TIMEOUT: Duration = Duration::from_secs(2);
/// Hosts of SRV records that are looked up at once.
const LOOKUPS: usize = 16;

/// Never returns. A name that cannot be resolved changes nothing: a resolver that is away must not empty the fleet.
pub async fn follow(members: &Members, number: usize, dns: &Dns) {
    let name = dns.question.name();
    let mut before = None;
    let mut complained = false;
    loop {
        match tokio::time::timeout(TIMEOUT, resolve(dns)).await.unwrap_or(Err(NetError::Timeout)) {
            Ok(addresses) => {
                complained = false;
                if before.as_ref() != Some(&addresses) {
                    members.set(number, addresses.clone());
                    before = Some(addresses);
                }
            }
            Err(error) if !complained => {
                tracing::warn!(name, %error, "the name cannot be resolved; the replicas stay");
                complained = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(dns.interval).await;
    }
}

async fn resolve(dns: &Dns) -> Result<BTreeSet<Address>, NetError> {
    let resolver = resolver(dns.server)?;
    match &dns.question {
        Question::Addresses { name, port } => {
            let found = resolver.lookup_ip(name.as_str()).await?;
            Ok(found.iter().filter_map(|ip| address(SocketAddr::new(ip, *port))).collect())
        }
        Question::Services { name } => services(&resolver, name).await,
    }
}

/// Made anew for every question, so that changes of the system's files are followed. It keeps no answers: the interval
/// says how old they may be.
fn resolver(server: Option<SocketAddr>) -> Result<TokioResolver, NetError> {
    let mut builder = match server {
        None => TokioResolver::builder_tokio()?,
        Some(server) => {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = server.port();
                connection
            });
            let server = NameServerConfig::new(server.ip(), true, connections.to_vec());
            let config = ResolverConfig::from_name_servers(vec![server]);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        }
    };
    let options = builder.options_mut();
    options.cache_size = 0;
    options.timeout = options.timeout.min(SERVER_TIMEOUT);
    // A pod of two address families is one replica.
    options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
    builder.build()
}

/// The hosts of the records with the most urgent priority (RFC 2782), each with its port. Weights say nothing here:
/// the router knows better how much each can take.
async fn services(resolver: &TokioResolver, name: &str) -> Result<BTreeSet<Address>, NetError> {
    let found = resolver.srv_lookup(name).await?;
    let records = || {
        found.answers().iter().filter_map(|record| match &record.data {
            RData::SRV(service) => Some(service),
            _ => None,
        })
    };
    let first = records().map(|service| service.priority).min();
    let targets: BTreeSet<_> = records()
        .filter(|service| Some(service.priority) == first && !service.target.is_root() && service.port > 0)
        .map(|service| (service.target.clone(), service.port))
        .take(MAX_REPLICAS)
        .collect();
    let hosts = stream::iter(targets).map(async |(target, port)| match resolver.lookup_ip(target).await {
        Ok(found) => Ok(found.iter().map(|ip| SocketAddr::new(ip, port)).collect()),
        // A host that has just gone, and its record not yet.
        Err(error) if error.is_no_records_found() => Ok(Vec::new()),
        Err(error) => Err(error),
    });
    let hosts: Vec<Vec<SocketAddr>> = hosts.buffer_unordered(LOOKUPS).try_collect().await?;
    Ok(hosts.into_iter().flatten().filter_map(address).collect())
}

fn address(socket: SocketAddr) -> Option<Address> {
    socket.to_string().parse().ok()
}
