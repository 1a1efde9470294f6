//! The printed trace of one small run: shared prefix, fork, copy on write, preemption, a failed step.

use super::harness::*;
use crate::{EngineConfig, RunnerError, StepTrace};

#[test]
fn the_trace_reads_like_a_table() {
    let mut checked = Checked::new(EngineConfig { max_batched_tokens: 12, ..config(11) });
    checked.add(request(1, &prompt(1, 18), 6)).unwrap();
    checked.add(choices(2, &prompt(2, 6), 8, 3)).unwrap();
    let mut lines = vec![StepTrace::HEADER.to_string()];
    let mut step = |checked: &mut Checked| {
        checked.step();
        lines.push(checked.engine.trace().to_string());
    };
    (0..3).for_each(|_| step(&mut checked));
    checked.add(request(3, &prompt(1, 18), 4)).unwrap();
    (0..10).for_each(|_| step(&mut checked));
    checked.engine.runner_mut().fail(0, RunnerError::Step("out of memory".into()));
    checked.add(request(4, &prompt(4, 5), 4)).unwrap();
    while checked.engine.has_work() {
        step(&mut checked);
    }
    checked.check_answers();
    insta::assert_snapshot!(lines.join("\n"));
}
