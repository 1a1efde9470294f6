//! What the scheduler itself costs, around a runner that answers at once.
//!
//! `cargo bench -p servelab-benches --bench engine`

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use servelab_engine::block_pool::{BlockPool, Link};
use servelab_engine::{
    Engine, EngineConfig, HashChain, ModelRunner, Request, RequestId, RowOutput, RunnerError, SamplingParams,
    Step, StepOutput, StopConditions, TokenId,
};

const BLOCK_SIZE: u32 = 16;
const RUNNING: u32 = 256;
const PROMPT: u32 = 512;

/// Answers token 1 to everything.
struct Instantly;

impl ModelRunner for Instantly {
    fn run(&mut self, step: &Step) -> Result<StepOutput, RunnerError> {
        let rows = step.rows.iter().map(|_| RowOutput { token: 1, logprobs: None });
        Ok(StepOutput { rows: rows.collect() })
    }
}

fn request(id: u64, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt: (0..PROMPT).map(|at| (id as u32).wrapping_mul(7919) + at).collect(),
        n: 1,
        sampling: Arc::new(SamplingParams::greedy()),
        stop: StopConditions { max_tokens, min_tokens: 0, stop_token_ids: [2].into() },
        priority: 0,
        cache_salt: 0,
        arrival: Duration::ZERO,
    }
}

/// Tokens generated before the measured engine is made anew; the context is 512 to 1,536 tokens.
const OUTPUT: u32 = 1024;

/// An engine in which `RUNNING` sequences decode.
fn decoding() -> Engine<Instantly> {
    let config = EngineConfig {
        block_size: BLOCK_SIZE,
        num_blocks: RUNNING * (PROMPT + OUTPUT) / BLOCK_SIZE,
        max_model_len: PROMPT + OUTPUT,
        max_batched_tokens: RUNNING * PROMPT,
        max_running: RUNNING,
        max_waiting: RUNNING,
        prefix_cache: true,
    };
    let mut engine = Engine::new(config, Instantly).expect("the configuration is possible");
    for id in 0..u64::from(RUNNING) {
        engine.add(request(id, OUTPUT)).expect("it fits");
    }
    engine.step(Duration::ZERO);
    engine
}

fn steps(criterion: &mut Criterion) {
    let mut engine = decoding();
    criterion.bench_function("plan and apply, 256 running sequences", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut measured = Duration::ZERO;
            for _ in 0..iterations {
                if engine.stats().running < RUNNING {
                    engine = decoding();
                }
                let start = Instant::now();
                black_box(engine.step(Duration::ZERO));
                measured += start.elapsed();
            }
            measured
        });
    });
}

fn prefix_lookup(criterion: &mut Criterion) {
    let tokens: Vec<TokenId> = (0..4096).collect();
    let block_size = BLOCK_SIZE as usize;
    let mut pool = BlockPool::new(4096, block_size);
    let mut chain = HashChain::new(block_size, 0);
    let mut link = Link::Root { salt: 0 };
    for (index, content) in tokens.chunks_exact(block_size).enumerate() {
        let block = pool.allocate().expect("the pool is large enough");
        let hash = chain.get(index, &tokens).expect("the block is full");
        link = pool.publish(block, hash, link, content);
    }
    criterion.bench_function("prefix lookup, 4096 tokens, all found", |bencher| {
        bencher.iter(|| {
            let mut chain = HashChain::new(block_size, 0);
            let prefix = pool.longest_prefix(black_box(&tokens), &mut chain, usize::MAX);
            assert_eq!(prefix.blocks.len(), tokens.len() / block_size);
            prefix
        });
    });
}

fn blocks(criterion: &mut Criterion) {
    let mut pool = BlockPool::new(4096, BLOCK_SIZE as usize);
    criterion.bench_function("allocate and free a block", |bencher| {
        bencher.iter(|| {
            let block = pool.allocate().expect("all but one are free");
            pool.release(black_box(block));
        });
    });
    let full = || {
        let mut pool = BlockPool::new(4096, BLOCK_SIZE as usize);
        let tokens: Vec<TokenId> = (0..4096 * BLOCK_SIZE).collect();
        let mut chain = HashChain::new(BLOCK_SIZE as usize, 0);
        let mut link = Link::Root { salt: 0 };
        let mut blocks = Vec::new();
        for (index, content) in tokens.chunks_exact(BLOCK_SIZE as usize).enumerate() {
            let block = pool.allocate().expect("the pool is large enough");
            link = pool.publish(block, chain.get(index, &tokens).expect("the block is full"), link, content);
            blocks.push(block);
        }
        pool.release_chain(&mut blocks);
        pool
    };
    criterion.bench_function("evict, allocate and free 4096 cached blocks", |bencher| {
        bencher.iter_batched_ref(
            full,
            |pool| {
                let blocks: Vec<_> = (0..4096).map_while(|_| pool.allocate()).collect();
                blocks.iter().for_each(|block| pool.release(*block));
                blocks.len()
            },
            BatchSize::LargeInput,
        );
    });
}

criterion_group!(benches, steps, prefix_lookup, blocks);
criterion_main!(benches);
