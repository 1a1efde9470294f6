//! What is asked of the fleet, how fast, and what counts as good.

use servelab_bench::prompt::Job;
use servelab_bench::workload::lengths::Span;
use servelab_bench::workload::{Workload, WorkloadOptions};

/// One workload with its ladder of rates.
pub struct Scenario {
    pub name: &'static str,
    /// What it is there to show.
    pub purpose: &'static str,
    options: WorkloadOptions,
    /// Jobs a second for the whole fleet, from idle to beyond what it can do.
    pub rates: &'static [f64],
    pub jobs: usize,
    /// Counts into goodput: first token within, and mean time per further token within.
    pub ttft_seconds: f64,
    pub tpot_seconds: f64,
}

impl Scenario {
    /// All of them.
    pub fn all() -> Vec<Self> {
        vec![
            Self::conversation(),
            Self::sessions(),
            Self::shared_prompts(),
            Self::one_prompt(),
            Self::uniform(),
        ]
    }

    fn conversation() -> Self {
        Self {
            name: "conversation",
            purpose: "Mooncake's conversations: long prompts that grow from turn to turn, one block in all of them",
            options: named("mooncake-conversation"),
            rates: &[4.0, 8.0, 10.0, 12.0, 14.0, 16.0],
            jobs: 4000,
            ttft_seconds: 5.0,
            tpot_seconds: 0.1,
        }
    }

    fn sessions() -> Self {
        let options = WorkloadOptions {
            turns: Some(Span { least: 2, most: 12 }),
            input: Some(Span { least: 100, most: 1500 }),
            output: Some(Span { least: 50, most: 400 }),
            turn_think_time: Some(std::time::Duration::from_secs(5)),
            prefix_tokens: Some(1000),
            ..named("multi-turn")
        };
        Self {
            name: "sessions",
            purpose: "conversations of 2 to 12 turns behind one system prompt, 5 s between an answer and the next turn",
            options,
            rates: &[4.0, 10.0, 16.0, 20.0, 24.0, 28.0],
            jobs: 2000,
            ttft_seconds: 1.0,
            tpot_seconds: 0.05,
        }
    }

    fn shared_prompts() -> Self {
        Self {
            name: "shared-prompts",
            purpose: "150 system prompts of 6,000 tokens, 1,200 tokens of one's own",
            options: WorkloadOptions { output: Some(Span::exactly(200)), ..named("shared-prefix") },
            rates: &[10.0, 30.0, 50.0, 70.0, 90.0, 110.0],
            jobs: 6000,
            ttft_seconds: 1.0,
            tpot_seconds: 0.05,
        }
    }

    fn one_prompt() -> Self {
        Self {
            name: "one-prompt",
            purpose: "one system prompt of 6,000 tokens before everything: whoever follows it alone collapses",
            options: WorkloadOptions {
                prefixes: Some(1),
                output: Some(Span::exactly(200)),
                ..named("shared-prefix")
            },
            rates: &[10.0, 40.0, 80.0, 100.0, 120.0, 140.0],
            jobs: 6000,
            ttft_seconds: 1.0,
            tpot_seconds: 0.05,
        }
    }

    fn uniform() -> Self {
        let options = WorkloadOptions {
            input: Some(Span { least: 256, most: 4096 }),
            output: Some(Span { least: 32, most: 512 }),
            ..named("random")
        };
        Self {
            name: "uniform",
            purpose: "prompts that share nothing: all that a prefix router can do here is harm",
            options,
            rates: &[10.0, 30.0, 50.0, 60.0, 70.0, 80.0],
            jobs: 6000,
            ttft_seconds: 1.0,
            tpot_seconds: 0.05,
        }
    }

    /// Its jobs, the same for every policy.
    pub fn jobs(&self, seed: u64) -> Vec<Job> {
        let workload = Workload::new(&self.options).expect("the options go together");
        workload.jobs(seed).take(self.jobs).collect()
    }
}

fn named(name: &str) -> WorkloadOptions {
    WorkloadOptions { name: Some(name.to_owned()), ..WorkloadOptions::default() }
}
