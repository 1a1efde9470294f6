#!/usr/bin/env bash
# A full report of this machine: the demo model and SmolLM2-135M's shape (random weights), each with servelab's engine
# and with the naive one, on a ladder of concurrencies.
#
#   benches/cpu/report.sh [OUT_FOLDER]        # by default benches/results/cpu/report; about 12 minutes
#
# Every folder gets result.json, report.md and report.html; compare-*.txt holds the two engines side by side, and
# report.png a picture of the first page (needs chromium). LADDER, REPEATS, DEMO_TIME and SMOLLM_TIME bound the work.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benches/results/cpu/report}
ladder=${LADDER:-1,2,4,8,16,32} repeats=${REPEATS:-3}
bin=${CARGO_TARGET_DIR:-target}/release/servelab
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

wait_ready() { # LOG: until the server's address is in it and answers
    for _ in $(seq 1500); do
        url=$(sed -n 's/^listening on //p' "$1")
        [ -n "$url" ] && curl -sf "$url/ready" >/dev/null && return
        sleep 0.2
    done
    echo "the server does not answer; it said:" >&2
    cat "$1" >&2
    return 1
}

measure() { # NAME ENGINE TIME SHAPE [FLAG of serve...]
    local name=$1-$2 engine=$2 time=$3 shape=$4 log
    shift 4
    [ "$engine" = servelab ] && engine=paged
    log=$(mktemp)
    # The load generator computes little, but what it computes must not wait: late, it would measure itself.
    nice -n 5 "$bin" serve --port 0 --engine "$engine" "$@" >"$log" 2>&1 &
    local server=$!
    wait_ready "$log"
    # Time and not requests: the naive engine, which computes one request at a time, would take an hour for the ladder.
    # Exit code 1 says that the client was late, which on a machine whose cores all compute it may be; so does the report.
    "$bin" bench --url "$url" --concurrency "$ladder" --repeats "$repeats" --duration "$time" --seed 1 \
        --input-tokens 64 --output-tokens 32 --hardware measured --model-shape "$shape" --weight-dtype bf16 \
        --label "$name" --metadata "engine=$engine" --metadata "machine=shared with other work" \
        --out "$out/$name" || [ $? = 1 ]
    kill $server && wait $server || true
    rm -r "$log" "$out/$name/requests.jsonl" "$out/$name/vllm"
}

for engine in servelab naive; do
    measure demo $engine "${DEMO_TIME:-3s}" crates/model/demo/config.json
    measure smollm2-135m $engine "${SMOLLM_TIME:-5s}" smollm2-135m --model smollm2-135m --load-format dummy
done
for model in demo smollm2-135m; do
    "$bin" bench compare "$out/$model-naive" "$out/$model-servelab" --force | tee "$out/compare-$model.txt"
done

profile=$(mktemp -d)
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
    --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$profile" --window-size=1360,1760 \
    --screenshot="$out/report.png" "file://$(realpath "$out")/smollm2-135m-servelab/report.html" 2>/dev/null ||
    echo "no chromium, no picture"
rm -rf "$profile"
