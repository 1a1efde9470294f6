#!/usr/bin/env python3
"""The same workload run for real and simulated: how far `servelab sim` is off on this machine.

    benches/fidelity/compare.py [OUT_FOLDER] [--model NAME] [--rounds N] [--seconds S] [--rates R,..] [--debug]

Each round, on two replicas of one thread each with random weights in MODEL's shape:

1. both are measured at once, since they share the machine's memory, at 1, 2, 4, 8 and 16 clients each; `servelab sim
   calibrate` fits a profile to the points of the first and predicts each level from the others
2. `servelab bench` sends requests through `servelab route` to both of them, at each of the rates
3. `servelab sim` runs the same requests over two simulated replicas of that profile

Compared are the medians of TTFT and TPOT and the output tokens a second; what is shown are medians over the rounds, since
a machine that others use as well changes its pace between one step and the next. OUT_FOLDER (default
benches/results/fidelity) gets compare.json and compare.md. Ends by itself, in about eight minutes by default.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from programs import ROOT, bench_metrics, build, commit, keep, machine, ready  # noqa: E402

CLIENTS = "1,2,4,8,16"
INPUT, OUTPUT = "32:96", "16:48"
# As servelab serve has them by default on a CPU, said so that server and simulation have the same.
LIMITS = ["--max-running", "64", "--max-batched-tokens", "512"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "benches/results/fidelity")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12, help="of each level of the calibration; a rate has three times that")
    parser.add_argument("--rates", default="1,2", help="requests a second over both replicas, below saturation")
    parser.add_argument("--debug", action="store_true", help="take the debug build, to try this program itself")
    return parser.parse_args()


def bench(options, url, *how):
    return [options.servelab, "bench", "--url", url, "--input-tokens", INPUT, "--output-tokens", OUTPUT, "--ignore-eos",
            "--repeats", 1, "--warm-up", 0, "--quiet", *how]


def ended(process):
    """What a program wrote; 1 says that figures may be trusted less, which are shown all the same."""
    out, errors = process.communicate()
    if process.returncode not in (0, 1):
        sys.exit(f"{process.args} ended with {process.returncode}:\n{errors}")
    return out


def spawn(command):
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calibrate(options, replicas, folder):
    """A profile, and the errors at levels that were held out."""
    outs = [folder / f"level-{number}" for number in range(len(replicas))]
    both = [
        spawn(bench(options, url, "--concurrency", CLIENTS, "--duration", f"{options.seconds:g}s", "--out", out))
        for url, out in zip(replicas, outs)
    ]
    for process in both:
        ended(process)
    profile = folder / "profile.toml"
    fit = spawn([options.servelab, "sim", "calibrate", outs[0], "--hardware", "measured", *LIMITS, "--json", "--out",
                 profile])
    return profile, json.loads(ended(fit))


def really(options, url, rate):
    metrics = bench_metrics(bench(options, url, "--rate", rate, "--duration", f"{3 * options.seconds:g}s", "--json"))
    if metrics["failed"]:
        sys.exit(f"{metrics['failed']} requests failed")
    return {
        "ttft_ms": metrics["ttft_ms"]["median"],
        "tpot_ms": metrics["tpot_ms"]["median"],
        "tokens_per_second": metrics["output_throughput"],
    }


def simulated(options, profile, rate):
    command = [options.servelab, "sim", "--model", options.model, "--hardware", profile, "--replicas", 2, "--tp", 1, *LIMITS,
               "--input-tokens", INPUT, "--output-tokens", OUTPUT, "--rate", rate, "--duration", f"{3 * options.seconds:g}s",
               "--json"]
    found = json.loads(ended(spawn(command)))[0]
    return {
        "ttft_ms": 1e3 * found["ttft_seconds"]["p50"],
        "tpot_ms": 1e3 * found["tpot_seconds"]["p50"],
        "tokens_per_second": found["output_tokens"] / found["seconds"],
    }


def measure(options, scratch):
    running, replicas, rounds = [], [], []
    try:
        for _ in range(2):
            command = [options.servelab, "serve", "--model", options.model, "--load-format", "dummy", "--device", "cpu", "--threads",
                       "1", "--port", "0", "--log-level", "warn", *LIMITS]
            server, url = ready(command)
            running.append(server)
            replicas.append(url)
        route = [options.servelab, "route", "--port", "0", *(part for url in replicas for part in ("--replica", url))]
        router, url = ready(route)
        running.append(router)
        for number in range(options.rounds):
            folder = scratch / str(number)
            folder.mkdir()
            profile, fit = calibrate(options, replicas, folder)
            rates = {
                rate: {"real": really(options, url, rate), "simulated": simulated(options, profile, rate)}
                for rate in options.rates.split(",")
            }
            rounds.append({"fit": fit, "rates": rates})
            print(number + 1, json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        return rounds
    finally:
        for process in reversed(running):
            process.stop()


def cells(rounds, rate):
    row = {}
    for key in ("ttft_ms", "tpot_ms", "tokens_per_second"):
        real, simulated = ([found["rates"][rate][kind][key] for found in rounds] for kind in ("real", "simulated"))
        errors = [a / b - 1 for a, b in zip(simulated, real)]
        row[key] = {
            "real": statistics.median(real), "simulated": statistics.median(simulated),
            "error": statistics.median(errors), "least": min(errors), "most": max(errors),
        }
    return row


def held_out(rounds):
    """Per level: the median over the rounds of each error."""
    levels = zip(*(found["fit"]["held_out"] for found in rounds))
    keys = ("ttft", "tpot", "requests_per_second")
    return [{key: statistics.median(point[key] for point in level) for key in keys} for level in levels]


def render(result):
    percent = lambda share: f"{100 * share:+.0f} %"
    lines = [
        f"{len(result['rounds'])} rounds, {result['machine']}: two replicas of one thread with the shape of {result['model']}, prompts of "
        f"{INPUT.replace(':', ' to ')} tokens, answers of {OUTPUT.replace(':', ' to ')}. Medians over the rounds; in brackets the least and the most.",
        "",
        "| requests/s | | real | simulated | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = {"ttft_ms": "TTFT p50, ms", "tpot_ms": "TPOT p50, ms", "tokens_per_second": "output tokens/s"}
    for rate, row in result["table"].items():
        for key, name in names.items():
            cell = row[key]
            spread = f"{percent(cell['error'])} ({percent(cell['least'])} to {percent(cell['most'])})"
            lines.append(f"| {rate} | {name} | {cell['real']:.1f} | {cell['simulated']:.1f} | {spread} |")
    lines += ["", "The means of a level of load, predicted from the other levels:", "", "| clients | TTFT | TPOT | requests/s |",
              "| --- | --- | --- | --- |"]
    for clients, errors in zip(CLIENTS.split(","), result["held_out"]):
        lines.append(f"| {clients} | {percent(errors['ttft'])} | {percent(errors['tpot'])} | {percent(errors['requests_per_second'])} |")
    return "\n".join(lines) + "\n"


def main():
    options = parse()
    folder = build(options.debug)
    options.servelab = folder / "servelab"
    with tempfile.TemporaryDirectory() as scratch:
        rounds = measure(options, Path(scratch))
    result = {
        "machine": machine(), "commit": commit(), "build": folder.name, "model": options.model, "seconds": options.seconds,
        "rounds": rounds, "table": {rate: cells(rounds, rate) for rate in options.rates.split(",")}, "held_out": held_out(rounds),
    }
    keep(options.out, "compare", result, render(result))


if __name__ == "__main__":
    main()
