#!/usr/bin/env bash
# servelab beside llama.cpp on the same random weights (SmolLM2-135M's shape, bf16), in one run.
#
#   benches/cpu/compare.sh WORK_FOLDER LLAMA_BIN_FOLDER [OUT_FILE]
#
# WORK_FOLDER is what make_checkpoint.py wrote; LLAMA_BIN_FOLDER holds llama-batched-bench and
# llama-server of a native llama.cpp build. The programs run one after the other, round by round, so
# that a change in the machine's load meets all of them.
set -euo pipefail
work=$1 llama=$2 out=${3:-/dev/stdout}
cd "$(dirname "$0")/../.."

threads=2 rounds=${ROUNDS:-3} input=128 output=64
export CARGO_TERM_QUIET=true
cargo build --release
cargo build --release -p servelab-model --example decode_speed
bin=${CARGO_TARGET_DIR:-target}/release
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

engines() {
    for round in $(seq "$rounds"); do
        echo "# round $round: llama.cpp, flash attention off, then on"
        for fa in off on; do
            "$llama/llama-batched-bench" -m "$work/bf16.gguf" -t $threads -npp 512 -ntg 64 -npl 1,4,16 \
                -fa $fa -c 10240 --output-format jsonl 2>/dev/null | grep '^{'
        done
        echo "# round $round: servelab"
        json=$(mktemp)
        "$bin/examples/decode_speed" --preset smollm2-135m --dtype bf16 --threads $threads \
            --engines "$([ "$round" = 1 ] && echo paged,naive || echo paged)" --repeat 1 --json "$json" >/dev/null
        cat "$json"; echo; rm "$json"
    done
}

wait_ready() {
    for _ in $(seq 300); do
        curl -sf "$1" >/dev/null && return
        sleep 0.2
    done
    echo "$1 does not answer" >&2
    return 1
}

# Of a result the figures that are compared, in one line.
line='
import json, sys
result = json.load(sys.stdin)
names = ["model_id", "max_concurrency", "completed", "failed", "total_input_tokens", "total_output_tokens", "duration",
         "output_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_itl_ms"]
figures = {name: round(result[name], 2) if isinstance(result[name], float) else result[name] for name in names}
figures["prompts"] = result["header"]["workload"]["prompt_form"]
figures["client_bound"] = result["points"][0]["repeats"][0]["client"].get("bound")
print(json.dumps(figures))
'

served() { # URL MODEL CLIENTS
    for clients in $3; do
        # All of it counts, the filling and the emptying of the batch as well. Exit code 1 says that the client was
        # late, which on a machine that computes with all its cores it may be; the line says so too.
        "$bin/servelab" bench --url "$1" --model "$2" --concurrency "$clients" --requests $((clients * 3)) \
            --input-tokens $input --output-tokens $output --warm-up 0 --no-cool-down --repeats 1 --seed 1 --json \
            2>/dev/null | python3 -c "$line" || true
    done
}

servelab() { # CLIENTS [FLAG...]
    local clients=$1
    shift
    "$bin/servelab" serve --model "$work/hf" --served-model-name bench --port 18080 --threads $threads "$@" >/dev/null 2>&1 &
    local server=$!
    wait_ready http://127.0.0.1:18080/ready
    served http://127.0.0.1:18080 bench "$clients"
    kill $server && wait $server || true
}

http() {
    local server
    echo "# over HTTP: servelab"
    servelab "1 16 32"
    echo "# over HTTP: servelab, naive engine"
    servelab "1 16" --engine naive
    for slots in 1 16 32; do
        echo "# over HTTP: llama-server, $slots slots, flash attention off"
        "$llama/llama-server" -m "$work/bf16.gguf" -t $threads -tb $threads -fa off -np $slots -c $((slots * 256)) \
            --no-webui --port 18081 >/dev/null 2>&1 &
        server=$!
        wait_ready http://127.0.0.1:18081/health
        served http://127.0.0.1:18081 bench $slots
        kill $server && wait $server || true
    done
}

parts=${PARTS:-engines http}
{ date -u +"# %F"; lscpu | grep -E '^(Model name|CPU\(s\))' | sed 's/^/# /'; for part in $parts; do $part; done; } | tee "$out"
