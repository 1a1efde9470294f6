//! Benchmarks live in `engine.rs`, `operations.rs` and `router.rs`, the test bed of the router's choices in
//! `routing/`; recorded results in `results/`.

pub mod routing;
