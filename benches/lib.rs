//! Benchmarks live in `engine.rs` and `operations.rs`; recorded results in `results/`.
