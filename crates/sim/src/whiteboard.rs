//! A capacity plan as one would write it on a whiteboard: the formula, the numbers put in, the result.

use crate::numbers::{
    bandwidth, bytes, dollars, flops, given, grouped, parameters, plural, power, seconds, short, tenths,
    whole,
};
use crate::planner::CapacityPlan;
use crate::roofline::Limit;

/// No line is longer, in characters.
pub const WIDTH: usize = 100;
/// Of the label and the formula's number.
const LABEL: usize = 14;
const WARNING_LABEL: usize = 9;
/// Of the numbers put in, so that the results stand below each other.
const NUMBERS: usize = 60;

/// The plan in fewer than 25 lines, without its warnings.
pub fn lines(plan: &CapacityPlan) -> Vec<String> {
    let mut lines = vec![title(plan), String::new()];
    lines.extend(load(plan));
    lines.extend(memory(plan));
    lines.extend(speed(plan));
    lines.extend(fleet(plan));
    lines.extend(price(plan));
    lines
}

/// The warnings, each in one or a few lines.
pub fn warning_lines(plan: &CapacityPlan) -> Vec<String> {
    let mut lines = Vec::new();
    for warning in &plan.warnings {
        let mut label = warning.id;
        for part in wrapped(&warning.text, WIDTH - WARNING_LABEL) {
            lines.push(format!("{label:<WARNING_LABEL$}{part}"));
            label = "";
        }
    }
    lines
}

fn title(plan: &CapacityPlan) -> String {
    let model = &plan.model;
    let title = format!(
        "{}, weights {}, KV {}, on {} x {} a replica",
        model.name, model.weight_dtype, model.kv_dtype, plan.memory.gpus_per_replica, plan.hardware.name
    );
    // Of a long path the end tells most.
    title.chars().skip(title.chars().count().saturating_sub(WIDTH)).collect()
}

/// `formula` is its number in [`crate::formulas`], if it has one.
fn row(label: &str, formula: &str, numbers: &str, result: &str) -> String {
    let label = format!("{label:<10}{formula}");
    // A long result moves to the left rather than out of the line.
    let room = WIDTH.saturating_sub(LABEL + " = ".len() + result.chars().count()).min(NUMBERS);
    format!("{label:<LABEL$}{numbers:<room$} = {result}")
}

fn load(plan: &CapacityPlan) -> [String; 3] {
    let (load, assumptions) = (&plan.load, &plan.assumptions);
    let peak = short(load.peak_requests_per_second);
    let per_day = short(load.requests_per_day);
    let sessions = match assumptions.sessions_per_user {
        1.0 => String::new(),
        sessions => format!(" x {} sessions", given(sessions)),
    };
    let users = given(assumptions.daily_users);
    let requests = given(assumptions.requests_per_session);
    let mean = short(load.mean_requests_per_second);
    let factor = given(assumptions.peak_factor());
    let input = format!(
        "{peak} x {} in = {}/s",
        grouped(assumptions.input_tokens as f64),
        short(load.peak_input_tokens_per_second)
    );
    let output = format!(
        "x {} out, mean {}/s",
        grouped(assumptions.output_tokens as f64),
        short(load.mean_output_tokens_per_second)
    );
    let peak_output = short(load.peak_output_tokens_per_second);
    [
        row(
            "requests",
            "",
            &format!("{users} users{sessions} x {requests} requests"),
            &format!("{per_day} a day"),
        ),
        row(
            "QPS",
            "",
            &format!("{per_day} / 86,400 s = {mean} mean, x {factor} peak"),
            &format!("{peak} requests/s"),
        ),
        row("tokens", "", &format!("{input}; {output}"), &format!("{peak_output} out/s")),
    ]
}

fn memory(plan: &CapacityPlan) -> [String; 4] {
    let (memory, assumptions, model) = (&plan.memory, &plan.assumptions, &plan.model);
    let pool = bytes(memory.kv_pool_bytes);
    let weights = format!("{} parameters x {} B", parameters(model.parameters), model.weight_dtype.bytes());
    let kv = format!(
        "2 x {} layers x {} kv heads x {} x {} B",
        model.layers,
        model.kv_heads,
        model.head_dim,
        model.kv_dtype.bytes()
    );
    let room = format!(
        "{} x ({} x {} - {} GB activations) - weights",
        memory.gpus_per_replica,
        bytes(plan.hardware.memory_bytes),
        given(assumptions.memory_utilisation),
        given(assumptions.activation_bytes_per_gpu / 1e9)
    );
    let tokens = grouped(assumptions.tokens_per_request() as f64);
    let batch = match plan.speed.batch < memory.capacity_requests {
        true => format!("{} (of {})", whole(plan.speed.batch), whole(memory.capacity_requests)),
        false => format!("{} requests", whole(plan.speed.batch)),
    };
    [
        row("weights", "", &weights, &bytes(memory.weight_bytes)),
        row("KV", "F1", &kv, &format!("{} B/token", grouped(memory.kv_bytes_per_token))),
        row("KV room", "", &room, &format!("{pool}, {} tokens", short(memory.kv_pool_tokens))),
        row("batch", "F4", &format!("{pool} / ({tokens} tokens x {})", stored(plan)), &batch),
    ]
}

/// Bytes that a token takes in all GPUs of a replica.
fn stored(plan: &CapacityPlan) -> String {
    let one = bytes(plan.memory.kv_bytes_per_token);
    match plan.memory.kv_copies {
        1 => one,
        copies => format!("{one} x {copies}"),
    }
}

fn gpus(plan: &CapacityPlan) -> String {
    plural(plan.memory.gpus_per_replica.into(), "GPU")
}

fn speed(plan: &CapacityPlan) -> [String; 4] {
    let (speed, assumptions) = (&plan.speed, &plan.assumptions);
    let floor = seconds(speed.step_floor_seconds);
    let decode = short(speed.decode_tokens_per_second_per_gpu);
    let prompt = seconds(speed.prefill_floor_gpu_seconds);
    let batch = whole(speed.batch);
    let efficiency = given(assumptions.decode_efficiency);
    let products = format!(
        "{} x 2 x {} / {}",
        grouped(assumptions.uncached_tokens()),
        parameters(plan.model.streamed_parameters()),
        flops(speed.flops_per_second_per_gpu)
    );
    let attention = seconds(speed.prefill_attention_gpu_seconds);
    let per_token = seconds(speed.prefill_gpu_seconds_per_token);
    let mfu = given(assumptions.mfu);
    let output_tokens = grouped(assumptions.output_tokens as f64);
    [
        row("step", "F2", &step(plan), &format!("{floor}, {}-bound", speed.step_limit.name())),
        row(
            "decode",
            "F3",
            &format!("{batch} / ({floor} / {efficiency} efficiency) / {}", gpus(plan)),
            &format!("{decode} tok/s/GPU"),
        ),
        row(
            "prefill",
            "F5",
            &format!("{products} + {attention} attention"),
            &format!("{prompt} ({per_token}/token)"),
        ),
        row(
            "request",
            "F6",
            &format!("{prompt} / {mfu} MFU + {output_tokens} / {decode}"),
            &format!("{} GPU-s", short(speed.gpu_seconds_per_request)),
        ),
    ]
}

/// The term of F2 that binds.
fn step(plan: &CapacityPlan) -> String {
    let speed = &plan.speed;
    let gpus = plan.memory.gpus_per_replica;
    let batch = whole(speed.batch);
    match speed.step_limit {
        Limit::Compute => format!(
            "2 x {} x {batch} / ({gpus} x {})",
            parameters(plan.model.streamed_parameters()),
            flops(speed.flops_per_second_per_gpu)
        ),
        _ => format!(
            "({} + {batch} x {} x {}) / ({gpus} x {})",
            bytes(plan.model.streamed_bytes()),
            given(speed.context_tokens),
            stored(plan),
            bandwidth(plan.hardware.bandwidth_bytes_per_second)
        ),
    }
}

fn first_token(plan: &CapacityPlan) -> String {
    let speed = &plan.speed;
    if speed.ttft_seconds > speed.prefill_seconds {
        return "a step of one sequence, longer than the prompt; no queue".to_owned();
    }
    let prompt = seconds(speed.prefill_floor_gpu_seconds);
    format!("{prompt} / {} / {}, no queue", given(plan.assumptions.mfu), gpus(plan))
}

fn fleet(plan: &CapacityPlan) -> [String; 4] {
    let (fleet, speed, assumptions) = (&plan.fleet, &plan.speed, &plan.assumptions);
    let peak = short(plan.load.peak_requests_per_second);
    let request = short(speed.gpu_seconds_per_request);
    let (ttft, prefill) = (seconds(speed.ttft_seconds), seconds(speed.prefill_seconds));
    let tpot = seconds(fleet.peak_tpot_seconds);
    let output_tokens = grouped(assumptions.output_tokens as f64);
    [
        row(
            "GPUs",
            "",
            &format!("{peak}/s x {request} GPU-s x {} headroom", given(assumptions.headroom)),
            &format!("{} in {}", whole(fleet.gpus), plural(fleet.replicas, "replica")),
        ),
        row("TTFT", "", &first_token(plan), &ttft),
        row(
            "peak TPOT",
            "",
            &format!(
                "batch {}: {} + {} prompts x {prefill} / {output_tokens}",
                tenths(fleet.peak_batch),
                seconds(fleet.peak_step_seconds),
                tenths(fleet.peak_batch - 1.0)
            ),
            &format!("{tpot} ({} full)", seconds(speed.full_batch_tpot_seconds)),
        ),
        row(
            "in flight",
            "F7",
            &format!("{peak}/s x ({ttft} + {output_tokens} x {tpot})"),
            &format!("{} of {} slots", short(fleet.in_flight), whole(fleet.slots)),
        ),
    ]
}

fn price(plan: &CapacityPlan) -> Vec<String> {
    let fleet = &plan.fleet;
    let (Some(price), Some(busy), Some(fixed)) =
        (fleet.dollars_per_gpu_hour, fleet.dollars_per_million_busy, fleet.dollars_per_million_fixed)
    else {
        return Vec::new();
    };
    let price = dollars(price);
    let rate = short(fleet.output_tokens_per_second_per_gpu);
    let watts = fleet.watts.map_or(String::new(), |watts| format!(" ({})", power(watts)));
    vec![
        row(
            "price",
            "F10",
            &format!("{price}/h / ({rate} tok/s/GPU x 3600) x 1M"),
            &format!("{} per 1M out", dollars(busy)),
        ),
        row(
            "all day",
            "",
            &format!("{}{watts} at {price}/h, never scaled in", plural(fleet.gpus, "GPU")),
            &format!("{} per 1M out", dollars(fixed)),
        ),
    ]
}

/// Breaks a text at spaces.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
