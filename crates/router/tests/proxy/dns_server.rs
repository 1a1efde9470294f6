//! A real name server (hickory) for the zone `test.`, whose records the test writes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_server::Server;
use hickory_server::proto::rr::rdata::{A, AAAA, SOA, SRV};
use hickory_server::proto::rr::{Name, RData, Record, RecordSet, RecordType, RrKey};
use hickory_server::store::in_memory::InMemoryZoneHandler;
use hickory_server::zone_handler::{AxfrPolicy, Catalog, ZoneHandler, ZoneType};
use tokio::net::{TcpListener, UdpSocket};

pub struct DnsServer {
    pub address: SocketAddr,
    zone: Arc<InMemoryZoneHandler>,
    server: Server<Catalog>,
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

impl DnsServer {
    pub async fn start() -> Self {
        Self::on("127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn on(address: SocketAddr) -> Self {
        let zone = InMemoryZoneHandler::empty(name("test."), ZoneType::Primary, AxfrPolicy::Deny);
        let soa = SOA::new(name("ns.test."), name("me.test."), 1, 60, 60, 60, 1);
        assert!(zone.upsert(Record::from_rdata(name("test."), 1, RData::SOA(soa)), 1).await);
        let zone = Arc::new(zone);
        let mut catalog = Catalog::new();
        catalog.upsert(name("test.").into(), vec![zone.clone() as Arc<dyn ZoneHandler>]);
        let mut server = Server::new(catalog);
        let udp = UdpSocket::bind(address).await.unwrap();
        let address = udp.local_addr().unwrap();
        server.register_listener(TcpListener::bind(address).await.unwrap(), Duration::from_secs(5), 64);
        server.register_socket(udp);
        Self { address, zone, server }
    }

    /// These are all records that the name has of that type.
    async fn set(&self, owner: &str, kind: RecordType, records: impl Iterator<Item = RData>) {
        let mut set = RecordSet::new(name(owner), kind, 1);
        for data in records {
            set.insert(Record::from_rdata(name(owner), 1, data), 1);
        }
        let key = RrKey::new(name(owner).into(), kind);
        let mut all = self.zone.records_mut().await;
        if set.is_empty() { drop(all.remove(&key)) } else { drop(all.insert(key, Arc::new(set))) }
    }

    pub async fn set_addresses(&self, owner: &str, addresses: &[IpAddr]) {
        let of_v4 = addresses.iter().filter_map(|address| match address {
            IpAddr::V4(ip) => Some(RData::A(A(*ip))),
            IpAddr::V6(_) => None,
        });
        let of_v6 = addresses.iter().filter_map(|address| match address {
            IpAddr::V6(ip) => Some(RData::AAAA(AAAA(*ip))),
            IpAddr::V4(_) => None,
        });
        self.set(owner, RecordType::A, of_v4).await;
        self.set(owner, RecordType::AAAA, of_v6).await;
    }

    /// Services as priority, port and host.
    pub async fn set_services(&self, owner: &str, services: &[(u16, u16, &str)]) {
        let service =
            |(priority, port, host): &(u16, u16, &str)| RData::SRV(SRV::new(*priority, 1, *port, name(host)));
        self.set(owner, RecordType::SRV, services.iter().map(service)).await;
    }

    /// Nobody answers any more.
    pub async fn stop(mut self) {
        self.server.shutdown_gracefully().await.unwrap();
    }
}
