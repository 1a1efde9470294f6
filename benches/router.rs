//! What a decision of the router costs: tokenising the prompt, the lookup of its prefix, the choice among replicas.
//!
//! `cargo bench -p servelab-benches --bench router`

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use http::HeaderMap;
use serde_json::json;
use servelab_engine::{BlockHash, TokenId, hash_blocks};
use servelab_router::choice::index::{Matches, PrefixIndex};
use servelab_router::choice::load::LoadView;
use servelab_router::choice::picker::{Ask, Candidate, Picker};
use servelab_router::choice::policy::Policy;
use servelab_router::choice::rates::Pace;
use servelab_router::choice::replica_set::ReplicaId;
use servelab_router::parity::tokeniser::Tokeniser;
use servelab_router::prompt::read;

const BLOCK_SIZE: usize = 16;
const PROMPT: usize = 4096;
const PROMPTS: u32 = 64;

/// Tokens that no other number gives.
fn prompt(number: u32) -> Vec<TokenId> {
    (0..PROMPT as u32).map(|at| number * PROMPT as u32 + at).collect()
}

fn chain(number: u32) -> Vec<BlockHash> {
    hash_blocks(&prompt(number), BLOCK_SIZE, 0)
}

/// `replicas` replicas that hold `blocks` blocks each, of prompts that they share with their neighbours, and whole
/// the first [`PROMPTS`].
fn filled(replicas: u16, blocks: u32) -> PrefixIndex {
    let mut index = PrefixIndex::new(1 << 30);
    let per_prompt = (PROMPT / BLOCK_SIZE) as u32;
    for replica in 0..replicas {
        let id = ReplicaId(replica as u8);
        index.add(id, blocks);
        let others = (blocks / per_prompt).saturating_sub(PROMPTS);
        for number in 0..others {
            index.touch(id, &chain(1000 + u32::from(replica / 2) * 1000 + number));
        }
        (0..PROMPTS).for_each(|number| index.touch(id, &chain(number)));
    }
    index
}

/// Each lookup takes another prompt, so that the table is in no cache for it.
fn lookups(criterion: &mut Criterion) {
    let chains: Vec<Vec<BlockHash>> = (0..PROMPTS).map(chain).collect();
    for (replicas, blocks) in [(10, 30_000), (64, 30_000), (256, 30_000)] {
        let index = filled(replicas, blocks);
        let mut matches = Matches::default();
        let mut next = 0;
        let name = format!("prefix lookup, 4096 tokens, {replicas} replicas, {} blocks in all", index.len());
        criterion.bench_function(&name, |bencher| {
            bencher.iter(|| {
                next = (next + 1) % chains.len();
                index.matches(black_box(&chains[next]), &mut matches);
                assert_eq!(matches.of(ReplicaId(1)), (PROMPT / BLOCK_SIZE) as u32);
            });
        });
    }
}

fn record(criterion: &mut Criterion) {
    let mut index = filled(64, 30_000);
    let chains: Vec<Vec<BlockHash>> = (50_000..50_000 + 512).map(chain).collect();
    let mut next = 0;
    criterion.bench_function("note a new prompt of 4096 tokens, evicting as many blocks", |bencher| {
        bencher.iter(|| {
            next = (next + 1) % chains.len();
            index.touch(ReplicaId(3), black_box(&chains[next]));
        });
    });
}

fn hash(criterion: &mut Criterion) {
    let tokens = prompt(1);
    criterion.bench_function("hash a prompt of 4096 tokens", |bencher| {
        bencher.iter(|| hash_blocks(black_box(&tokens), BLOCK_SIZE, 0));
    });
}

fn choice(criterion: &mut Criterion) {
    let candidate = |at: u8| Candidate {
        replica: ReplicaId(at),
        key: u64::from(at).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        load: LoadView {
            in_flight: u32::from(at % 7),
            requests: u32::from(at % 7),
            pending_prefill_tokens: u64::from(at) * 100,
            decoding: u32::from(at % 5),
            kv_usage: f64::from(at) / 300.0,
        },
        pace: Pace::default(),
        latency_seconds: 0.1,
        matched_tokens: u32::from(at) * 16,
    };
    let candidates: Vec<Candidate> = (0..64).map(candidate).collect();
    let ask = Ask { prompt_tokens: 4096, output_tokens: 200, session: None, beginning: Some(7) };
    let mut picker = Picker::new(Policy::Cost, 1);
    criterion.bench_function("choose among 64 replicas by cost", |bencher| {
        bencher.iter(|| picker.pick(black_box(&ask), black_box(&candidates)));
    });
}

/// What token parity costs a request, beside what text hashing costs it: the body as it came, to the chain of its
/// blocks. The demo model's tokenizer and template; a chat of one system message and a question.
fn tokenise(criterion: &mut Criterion) {
    let files = servelab_front::prompts::TextFiles {
        tokenizer: bytes::Bytes::from_static(include_bytes!("../crates/model/demo/tokenizer.json")),
        tokenizer_config: Some(bytes::Bytes::from_static(include_bytes!(
            "../crates/model/demo/tokenizer_config.json"
        ))),
        chat_template: Some(bytes::Bytes::from_static(include_bytes!(
            "../crates/model/demo/chat_template.jinja"
        ))),
    };
    let tokeniser = Tokeniser::new(&files).expect("the demo model's tokenizer");
    for kilobytes in [1, 16, 256] {
        let system = "A block holds the keys and values of sixteen tokens. ".repeat(kilobytes * 1024 / 53);
        let messages =
            json!([{"role": "system", "content": system}, {"role": "user", "content": "What is a step?"}]);
        let body = json!({"messages": messages, "max_tokens": 40});
        let tokens = tokeniser.exact(body.clone()).expect("a prompt").tokens;
        let exact = format!("body of {kilobytes} KiB to its chain by tokens, {tokens} of them");
        criterion.bench_function(&exact, |bencher| {
            bencher.iter(|| tokeniser.exact(black_box(&body).clone()));
        });
        let text = format!("body of {kilobytes} KiB to its chain by text");
        let headers = HeaderMap::new();
        criterion.bench_function(&text, |bencher| bencher.iter(|| read(black_box(&body), &headers)));
    }
}

criterion_group!(benches, lookups, record, hash, choice, tokenise);
criterion_main!(benches);
