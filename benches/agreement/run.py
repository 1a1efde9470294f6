"""The same workload with `servelab bench`, aiperf and inference-perf against one server, one after the other, several
times over; their means side by side.

    cargo build --release && cargo build --release -p servelab-bench --example exact_server
    python benches/agreement/run.py OUT_FOLDER [--target "exact TTFT_MS ITL_MS"|"serve FLAGS"] [--aiperf FILE]
        [--inference-perf FILE] [--rounds N] [--requests N] [--concurrency N] [--input-tokens N] [--output-tokens N]

The target `exact` is crates/bench/examples/exact_server.rs: its TTFT and ITL are what is asked for, whatever else the
machine does, so that the truth is known, and a client that competes with the server for the cores changes only its own
figures. `serve` is `servelab serve` with these flags, by itself the demo model.
`--aiperf` and `--inference-perf` name the two programs, each in a virtual environment of its own (aiperf 0.13;
inference-perf 0.7, which wants Python 3.12). Nothing is downloaded: the tokenizer is a local folder.

The tools take turns round by round, so that a change in the machine's load meets all of them. OUT_FOLDER gets
`means.json`, what each tool found in each round, and `means.md`, a table of means over the rounds with their standard
errors, and where the definitions differ. What the tools wrote stays in a temporary folder that is named at the start.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
SERVELAB = RELEASE / "servelab"
# As far as the tools' definitions agree with ours, their means have to be within that of ours.
TOLERANCE = 0.03

# Key, name, and the tools that define it as ours is defined.
BOTH = ("aiperf", "inference-perf")
TOOLS = ("servelab", *BOTH)
FIGURES = [
    ("ttft_ms", "TTFT from send, ms", BOTH),
    ("tpot_ms", "TPOT, ms (aiperf: inter token latency)", BOTH),
    ("itl_ms", "ITL, ms", ("inference-perf",)),
    ("e2el_ms", "E2EL, ms", ()),
    ("requests_per_second", "requests/s", ()),
    ("output_tokens_per_second", "output tokens/s", ()),
    ("output_tokens", "output tokens of a request", BOTH),
    ("input_tokens", "prompt tokens of a request", ()),
]

NOTES = """
Where the definitions differ, the ratio is in brackets. TTFT: ours counts from the schedule; here, as with the others,
from sending; ours stops at the first text that is not empty, aiperf's at the first chunk. E2EL: ours ends with the last
token, aiperf's with the last chunk, which carries the usage, inference-perf's when its own code has dealt with the
answer. ITL: aiperf has none (what it calls so is TPOT); inference-perf counts the tokens of a chunk with its own
tokenizer and divides the gap among them. Rates: ours keeps the load up until the last measured request has ended, the
others let the batch run empty. Prompts: ours are token ids or words, the others' text of as many tokens of the given
tokenizer.
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--aiperf", default="aiperf")
    parser.add_argument("--inference-perf", default="inference-perf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--target", default="exact 200 20", help='"exact TTFT_MS ITL_MS" or "serve FLAGS"')
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "crates/model/demo")
    return parser.parse_args()


def main():
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="agreement-"))
    print("what the tools write is in", scratch, flush=True)
    server, url, model = start(options.target)
    rounds = []
    try:
        for number in range(1, options.rounds + 1):
            found = {}
            for tool in TOOLS:
                folder = scratch / f"{number:02}-{tool}"
                folder.mkdir()
                found[tool] = RUN[tool](options, url, model, folder, number)
                print(number, tool, json.dumps({key: rounded(value) for key, value in found[tool].items()}), flush=True)
            rounds.append(found)
    finally:
        server.terminate()
        server.wait()
    means = {tool: {key: summary([found[tool].get(key) for found in rounds]) for key, *_ in FIGURES} for tool in TOOLS}
    (options.out / "means.json").write_text(json.dumps({"target": options.target, "rounds": rounds, "means": means}, indent=1) + "\n")
    table = render(options, means)
    (options.out / "means.md").write_text(table)
    print(table)


def start(target):
    """A server on a free port; returns it, its address and its model."""
    program, *arguments = target.split()
    programs = {"exact": [RELEASE / "examples/exact_server"], "serve": [SERVELAB, "serve", "--port", "0"]}
    command = [*programs[program], *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in server.stdout:
        if line.startswith("listening on "):
            url = line.split()[2]
            break
    else:
        sys.exit("the server did not start")
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/ready").close()
            break
        except OSError:
            time.sleep(0.1)
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return server, url, json.load(answer)["data"][0]["id"]


def run(command, folder, allowed=(0,), **more):
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, **more)
    if done.returncode not in allowed:
        sys.exit(f"{command[0]} ended with {done.returncode}; see {folder}/log.txt")


def servelab(options, url, model, folder, number):
    # Exit code 1 says that the client was late, which a machine whose cores are all busy makes it; the folder says so.
    run([SERVELAB, "bench", "--url", url, "--model", model, "--concurrency", options.concurrency,
         "--requests", options.requests, "--input-tokens", options.input_tokens,
         "--output-tokens", options.output_tokens, "--repeats", 1, "--seed", number, "--out", folder / "result"],
        folder, allowed=(0, 1))
    result = json.loads((folder / "result/result.json").read_text())
    metrics = result["points"][0]["metrics"]
    if metrics["failed"]:
        sys.exit(f"requests failed; see {folder}")
    return {
        "input_tokens": metrics["input_tokens"]["mean"],
        "output_tokens": metrics["output_tokens"]["mean"],
        "ttft_ms": metrics["ttft_from_send_ms"]["mean"],
        "tpot_ms": metrics["tpot_ms"]["mean"],
        "itl_ms": metrics["itl_ms"]["mean"],
        "e2el_ms": metrics["e2el_ms"]["mean"],
        "requests_per_second": metrics["request_throughput"],
        "output_tokens_per_second": metrics["output_throughput"],
    }


def aiperf(options, url, model, folder, number):
    # Told to be offline, it would look for the tokenizer in its cache and not in the folder.
    run([options.aiperf, "profile", "--model", model, "--url", url, "--endpoint-type", "completions", "--streaming",
         "--tokenizer", options.tokenizer, "--concurrency", options.concurrency,
         "--request-count", options.requests, "--warmup-request-count", options.concurrency,
         "--synthetic-input-tokens-mean", options.input_tokens, "--synthetic-input-tokens-stddev", 0,
         "--output-tokens-mean", options.output_tokens, "--output-tokens-stddev", 0,
         "--num-dataset-entries", options.requests + options.concurrency,
         "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0", "--use-server-token-count",
         "--random-seed", number, "--ui", "none", "--artifact-dir", folder / "result"],
        folder)
    result = json.loads(next((folder / "result").rglob("profile_export_aiperf.json")).read_text())
    mean = lambda name: result[name]["avg"]
    return {
        "input_tokens": mean("input_sequence_length"),
        "output_tokens": mean("output_sequence_length"),
        "ttft_ms": mean("time_to_first_token"),
        "tpot_ms": mean("inter_token_latency"),
        "itl_ms": None,
        "e2el_ms": mean("request_latency"),
        "requests_per_second": mean("request_throughput"),
        "output_tokens_per_second": mean("output_token_throughput"),
    }


def inference_perf(options, url, model, folder, number):
    lengths = lambda tokens: {"min": tokens, "max": tokens, "mean": tokens, "std_dev": 0,
                              "total_count": options.requests + options.concurrency}
    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {"type": "random", "input_distribution": lengths(options.input_tokens),
                 "output_distribution": lengths(options.output_tokens)},
        "load": {
            "type": "concurrent", "num_workers": 1, "interval": 0, "base_seed": number,
            # The first stage warms up; only the second is read.
            "stages": [{"num_requests": options.concurrency, "concurrency_level": options.concurrency},
                       {"num_requests": options.requests, "concurrency_level": options.concurrency}],
        },
        "server": {"type": "vllm", "model_name": model, "base_url": url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(options.tokenizer)},
        "report": {"request_lifecycle": {"use_server_output_tokens": True}},
        "storage": {"local_storage": {"path": str(folder / "result")}},
    }
    path = folder / "config.yml"
    # JSON is YAML.
    path.write_text(json.dumps(config, indent=1))
    run([options.inference_perf, "--config_file", path], folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    report = json.loads(next((folder / "result").rglob("stage_1_lifecycle_metrics.json")).read_text())
    good = report["successes"]
    latency = good["latency"]
    if good["count"] != options.requests:
        sys.exit(f"requests failed; see {folder}")
    ms = lambda name: 1000 * latency[name]["mean"]
    return {
        "input_tokens": good["prompt_tokens"]["mean"],
        "output_tokens": good["output_tokens"]["mean"],
        "ttft_ms": ms("time_to_first_token"),
        "tpot_ms": ms("time_per_output_token"),
        "itl_ms": ms("inter_token_latency"),
        "e2el_ms": ms("request_latency"),
        "requests_per_second": good["throughput"]["requests_per_sec"],
        "output_tokens_per_second": good["throughput"]["output_tokens_per_sec"],
    }


RUN = {"servelab": servelab, "aiperf": aiperf, "inference-perf": inference_perf}


def rounded(value):
    return None if value is None else round(value, 3)


def summary(values):
    """Mean over the rounds and its standard error; None for what a tool does not report."""
    if any(value is None for value in values):
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "standard_error": error}


def render(options, means):
    lines = [
        f"`{options.target}`, {options.concurrency} clients, {options.input_tokens} tokens in, {options.output_tokens} out, "
        f"{options.rounds} rounds of {options.requests} requests with each tool in turn; means over the rounds and "
        "their standard errors, and what the others' are of ours.",
        "",
        "| | servelab bench | aiperf | ratio | inference-perf | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, name, same in FIGURES:
        ours = means["servelab"][key]
        cells = [shown(ours)]
        for tool in BOTH:
            theirs = means[tool][key]
            cells += [shown(theirs), ratio(ours, theirs, tool in same)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n" + NOTES


def shown(value):
    return "-" if value is None else f"{value['mean']:.4g} ± {value['standard_error']:.2g}"


def ratio(ours, theirs, is_same):
    if theirs is None:
        return "-"
    value = theirs["mean"] / ours["mean"]
    if not is_same:
        return f"({value:.3f})"
    return f"{value:.3f}" + ("" if abs(value - 1) <= TOLERANCE else " **apart**")


if __name__ == "__main__":
    main()
