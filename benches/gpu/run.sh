#!/usr/bin/env bash
# Everything that is claimed of the GPU, measured in one go: `just gpu`, or on a machine without Rust and network
#
#   benches/gpu/run.sh --binary PATH/servelab [--out FOLDER] [--only "doctor decode ..."] [--quick]
#
# Parts: doctor decode ways fp8 prefill comparison start. Each leaves its raw JSON in the folder (default
# benches/results/gpu/GPU-DATE), and table.py makes table.md of them, with the limits that doctor measured in this
# run. Needs python3; with torch and transformers in it, the comparison has transformers' continuous batching
# beside servelab. Weights are random, in the shapes of Llama 3.1 8B and Qwen3 0.6B.
#
# --device cpu runs the same on the CPU with a tiny shape, to see that the script works; its figures say nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
binary="" out="" device=cuda quick=""
parts="doctor decode ways fp8 prefill comparison start"
while [ $# -gt 0 ]; do
    case $1 in
        --binary) binary=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --only) parts=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --quick) quick=1; shift ;;
        *) echo "run.sh: $1 is unknown; see the top of $0" >&2; exit 2 ;;
    esac
done
binary=${binary:-$here/../../target/release/servelab}
[ -x "$binary" ] || { echo "run.sh: $binary is not there; cargo build --release, or name one with --binary" >&2; exit 2; }

case $device in
    cuda)
        large=llama-3.1-8b small=qwen3-0.6b batches="1 64 256" prompts="2048 8192" context=1024 answer=256
        doctor_flags=(--gpu)
        [ -z "$quick" ] || { batches="1 64" prompts=2048 answer=64; }
        name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -1 | tr ' A-Z' '-a-z' || true)
        out=${out:-$here/../results/gpu/${name:-gpu}-$(date -u +%F)}
        ;;
    cpu)
        large=smollm2-135m small=smollm2-135m batches="1 2" prompts=64 context=64 answer=4
        doctor_flags=()
        parts=${parts//fp8/}
        [ -n "$out" ] || { echo "run.sh: --device cpu records nothing; name a folder with --out" >&2; exit 2; }
        ;;
    *) echo "run.sh: --device is cuda or cpu" >&2; exit 2 ;;
esac
mkdir -p "$out"
failed=""
say() { echo "== $*" >&2; }

# One load in the engine itself: NAME REQUESTS CLIENTS INPUT OUTPUT [FLAG...]. A run that fails leaves no JSON, and
# its words in NAME.log.
offline() {
    local name=$1 requests=$2 clients=$3 input=$4 output=$5
    shift 5
    say "$name"
    if ! "$binary" bench --offline --load-format dummy --device "$device" --concurrency "$clients" \
        --requests "$requests" --input-tokens "$input" --output-tokens "$output" --repeats 1 --seed 1 \
        --no-prefix-cache --max-model-len $((input + output)) --no-cool-down --json "$@" \
        > "$out/$name.json" 2> "$out/$name.log"; then
        failed="$failed $name"
        tail -3 "$out/$name.log" >&2
        [ -s "$out/$name.json" ] || rm -f "$out/$name.json"
    fi
}

run_doctor() {
    say "doctor: limits, kernels, a small model"
    "$binary" doctor --json "${doctor_flags[@]}" > "$out/doctor.json" || failed="$failed doctor"
    if [ "$device" = cuda ] && grep -q '"gpu": null' "$out/doctor.json"; then
        grep '"no_gpu"' "$out/doctor.json" >&2
        echo "run.sh: there is no GPU to measure" >&2
        exit 1
    fi
}

# One wave of as many requests as there are clients: after the last prompt every step decodes the whole batch, which
# is what the median of the gaps between tokens shows.
run_decode() {
    for batch in $batches; do
        offline "decode-$batch" "$batch" "$batch" "$context" "$answer" --model $large --max-running "$batch" --warm-up 1
    done
}

# What recording steps and preparing them early are worth.
run_ways() {
    [ "$device" = cuda ] || return 0
    for batch in 1 64; do
        local flags=(--model $large --max-running $batch --warm-up 1)
        offline "decode-$batch-no-graphs" $batch $batch "$context" "$answer" "${flags[@]}" --no-cuda-graphs
        offline "decode-$batch-no-overlap" $batch $batch "$context" "$answer" "${flags[@]}" --no-overlap
        offline "decode-$batch-neither" $batch $batch "$context" "$answer" "${flags[@]}" --no-cuda-graphs --no-overlap
    done
}

run_fp8() {
    offline decode-1-fp8-weights 1 1 "$context" "$answer" --model $large --max-running 1 --warm-up 1 --dtype fp8
    offline decode-64-fp8-kv 64 64 "$context" "$answer" --model $large --max-running 64 --warm-up 1 --kv-dtype fp8
}

# The time to the first of two tokens is that of the prompt, in one step.
run_prefill() {
    for tokens in $prompts; do
        offline "prefill-$tokens" 5 1 "$tokens" 2 --model $large --max-running 1 --max-batched-tokens "$tokens" --warm-up 2
    done
}

# The comparison that nano-vllm, mini-sglang and vllm.rs publish: 256 requests at once, 100 to 1,024 tokens in and
# out. transformers gets the same lengths.
run_comparison() {
    say "comparison: servelab"
    local flags=(--model $small --repeats 1 --seed 1 --warm-up 0 --no-cool-down)
    case $device in
        cuda) flags+=(--workload engine-comparison) ;;
        cpu) flags+=(--rate inf --requests 4 --input-tokens 8:16 --output-tokens 4:8) ;;
    esac
    rm -rf "$out/comparison"
    if ! "$binary" bench --offline --load-format dummy --device "$device" "${flags[@]}" --out "$out/comparison" --quiet \
        > /dev/null 2> "$out/comparison.log"; then
        failed="$failed comparison"
        tail -3 "$out/comparison.log" >&2
        return 0
    fi
    say "comparison: transformers' continuous batching"
    python3 "$here/transformers_batching.py" "$out/comparison/requests.jsonl" --device "$device" --shape $small \
        > "$out/transformers.json" 2> "$out/transformers.log" || tail -3 "$out/transformers.log" >&2
}

# From the start of the process to the first token, stage by stage; the second start finds what the first compiled.
run_start() {
    for nth in first second; do
        say "start, the $nth"
        python3 "$here/start.py" "$binary" --device "$device" --model $large > "$out/start-$nth.json" \
            2> "$out/start-$nth.log" || { failed="$failed start-$nth"; tail -3 "$out/start-$nth.log" >&2; }
    done
}

for part in $parts; do "run_$part"; done
{ date -u +%FT%TZ; "$binary" --version; uname -r; nvidia-smi 2> /dev/null || true; } > "$out/machine.txt"
python3 "$here/table.py" "$out" > "$out/table.md"
cat "$out/table.md"
[ -z "$failed" ] || { echo "run.sh: failed:$failed (see the .log files in $out)" >&2; exit 1; }
