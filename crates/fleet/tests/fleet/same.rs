use std::time::Duration;

use servelab_fleet::page::{self, Heading};
use servelab_fleet::{FaultSettings, Scaler, Settings, simulate};

use super::small;

fn busy(seed: u64) -> Settings {
    let faults = FaultSettings {
        crashes_per_hour: 60.0,
        partitions_per_hour: 60.0,
        partition: Duration::from_secs(20),
    };
    Settings { faults, ..small::settings(3, 5.0, 120, seed) }
}

fn json(settings: Settings) -> String {
    serde_json::to_string(&simulate(settings, Scaler::fixed(3)).unwrap()).unwrap()
}

fn html(settings: Settings) -> String {
    let outcome = simulate(settings.clone(), Scaler::fixed(3)).unwrap();
    let heading = Heading { title: "a < b".into(), facts: Vec::new(), notes: Vec::new() };
    page::html(&heading, &settings, &[outcome]).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_others() {
    assert_eq!(json(busy(1)), json(busy(1)));
    assert_ne!(json(busy(1)), json(busy(2)));
    assert_eq!(html(busy(1)), html(busy(1)));
}

/// Router, queues, faults and all: which of the two replicas computes makes no difference to anything.
#[test]
fn a_fleet_of_real_engines_gives_the_same_bytes() {
    for seed in 0..6 {
        let exact = Settings { is_exact: true, ..busy(seed) };
        assert_eq!(json(busy(seed)), json(exact), "seed {seed}");
    }
}

#[test]
fn the_page_is_whole_and_loads_nothing() {
    let page = html(busy(3));
    assert!(page.contains("a &lt; b") && page.contains("Time to first token"));
    for word in ["http://", "https://", "src=", "@import"] {
        let found = page.match_indices(word).map(|(at, _)| &page[at..(at + 60).min(page.len())]);
        let foreign: Vec<&str> = found.filter(|text| !text.contains("www.w3.org")).collect();
        assert!(foreign.is_empty(), "{foreign:?}");
    }
}
