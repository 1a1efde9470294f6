#!/usr/bin/env python3
"""The same workload run for real and simulated: how far `servelab sim` is off on this machine.

    benches/fidelity/compare.py [OUT_FOLDER] [--models NAME=RATE,.. ..] [--rounds N] [--level-rounds N] [--seconds S]
                                [--debug]

For each model two replicas of one thread each are started, the demo checkpoint or random weights in the model's shape, and
a router before them. A round measures, one after the other:

1. both replicas at once, since they share the machine's memory, at 1, 2, 4, 8, 16 and 32 clients each, and at 3, 6, 12 and
   24
2. `servelab bench` through `servelab route` to both of them, by one client that pauses between requests, and at each of the
   rates

Then `servelab sim calibrate` fits one profile to the first levels of all rounds and predicts the second ones, which it has
not seen. What the one client waits longer than that profile says is the network's time: the router, and threads that
sleep before a request comes. With both `servelab sim` runs the requests of each rate over two simulated replicas. Rounds that are short and
many, since a machine that others use as well changes its pace between one minute and the next: calibration and what it is
held against are to meet the same of it. A figure that was measured is the median over the rounds. Levels of a few
milliseconds differ by half between rounds: --level-rounds has more rounds of step 1 alone.

OUT_FOLDER (default benches/results/fidelity) gets compare.json and compare.md. Ends by itself, in about twenty-five minutes by
default.
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

LEVELS, CHECKS = "1,2,4,8,16,32", "3,6,12,24"
INPUT, OUTPUT = "32:96", "16:48"
# As servelab serve has them by default on a CPU, said so that server and simulation have the same.
LIMITS = ["--max-running", "64", "--max-batched-tokens", "512"]
# Of the client that is alone.
PAUSES = ["--think-time", "50ms"]
FIGURES = {"ttft_ms": "TTFT p50, ms", "tpot_ms": "TPOT p50, ms", "tokens_per_second": "output tokens/s"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "benches/results/fidelity")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m=1,2", "demo=20,40"],
                        help="each with requests a second over both replicas, below saturation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--level-rounds", type=int, default=0, help="of step 1; at least --rounds")
    parser.add_argument("--seconds", type=float, default=6, help="of each level; a rate has three times that")
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


def levels(options, replicas, clients, folder):
    """The results of all replicas at these numbers of clients, measured at once."""
    outs = [folder / str(number) for number in range(len(replicas))]
    all_of_them = [
        spawn(bench(options, url, "--concurrency", clients, "--duration", f"{options.seconds:g}s", "--out", out))
        for url, out in zip(replicas, outs)
    ]
    for process in all_of_them:
        ended(process)
    return outs


def calibrate(options, fitted, checked, profile):
    command = [options.servelab, "sim", "calibrate", *fitted, *(part for out in checked for part in ("--check", out)),
               "--hardware", "measured", *LIMITS, "--json", "--out", profile]
    return json.loads(ended(spawn(command)))


def really(options, url, *load):
    metrics = bench_metrics(bench(options, url, *load, "--duration", f"{3 * options.seconds:g}s", "--json"))
    if metrics["failed"]:
        sys.exit(f"{metrics['failed']} requests failed")
    return {
        "ttft_ms": metrics["ttft_ms"]["median"],
        "tpot_ms": metrics["tpot_ms"]["median"],
        "tokens_per_second": metrics["output_throughput"],
    }


def simulated(options, profile, model, *load):
    # The same requests as the real ones.
    command = [options.servelab, "sim", "--model", model, "--hardware", profile, "--replicas", 2, "--tp", 1, *LIMITS,
               "--input-tokens", INPUT, "--output-tokens", OUTPUT, *load, "--duration", f"{3 * options.seconds:g}s", "--json"]
    found = json.loads(ended(spawn(command)))[0]
    return {
        "ttft_ms": 1e3 * found["ttft_seconds"]["p50"],
        "tpot_ms": 1e3 * found["tpot_seconds"]["p50"],
        # As the benchmark counts: all that was sent in the time of the load, over that time.
        "tokens_per_second": found["output_tokens"] / (3 * options.seconds),
    }


def measure(options, model, rates, scratch):
    running, replicas, fitted, checked, alone, rounds = [], [], [], [], [], []
    which = [] if model == "demo" else ["--model", model, "--load-format", "dummy"]
    try:
        for _ in range(2):
            command = [options.servelab, "serve", *which, "--device", "cpu", "--threads", "1", "--port", "0", "--log-level",
                       "warn", *LIMITS]
            server, url = ready(command)
            running.append(server)
            replicas.append(url)
        route = [options.servelab, "route", "--port", "0", *(part for url in replicas for part in ("--replica", url))]
        router, url = ready(route)
        running.append(router)
        for number in range(max(options.rounds, options.level_rounds)):
            fitted += levels(options, replicas, LEVELS, scratch / f"{model}-{number}-levels")
            checked += levels(options, replicas, CHECKS, scratch / f"{model}-{number}-checks")
            if number >= options.rounds:
                continue
            alone.append(really(options, url, "--concurrency", 1, *PAUSES))
            rounds.append({rate: really(options, url, "--rate", rate) for rate in rates})
            print(model, number + 1, json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    finally:
        for process in reversed(running):
            process.stop()
    profile = scratch / f"{model}.toml"
    fit = calibrate(options, fitted, checked, profile)
    expected = simulated(options, profile, model, "--users", 1, *PAUSES)["ttft_ms"]
    network_ms = max(0, statistics.median(figures["ttft_ms"] for figures in alone) - expected)
    network = ["--network-time", f"{network_ms:.3f}ms"]
    return {"fit": fit, "level_rounds": len(fitted) // len(replicas), "alone": alone, "network_ms": network_ms, "real": rounds,
            "simulated": {rate: simulated(options, profile, model, "--rate", rate, *network) for rate in rates}}


def cells(found, rate):
    row = {}
    for key in FIGURES:
        real = [figures[rate][key] for figures in found["real"]]
        simulated = found["simulated"][rate][key]
        row[key] = {"real": statistics.median(real), "least": min(real), "most": max(real), "simulated": simulated,
                    "error": simulated / statistics.median(real) - 1}
    return row


def render(result):
    percent = lambda share: f"{100 * share:+.0f} %"
    lines = [
        f"{result['rounds']} rounds of {result['seconds']:g} s a level, {result['machine']}: two replicas of one thread, prompts of "
        f"{INPUT.replace(':', ' to ')} tokens, answers of {OUTPUT.replace(':', ' to ')}. Medians over the rounds; in brackets the least and the most.",
        "",
        "| model | requests/s | | real | simulated | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, found in result["models"].items():
        for rate, row in found["table"].items():
            for key, name in FIGURES.items():
                cell = row[key]
                real = f"{cell['real']:.1f} ({cell['least']:.1f} to {cell['most']:.1f})"
                lines.append(f"| {model} | {rate} | {name} | {real} | {cell['simulated']:.1f} | {percent(cell['error'])} |")
    waits = ", ".join(f"{found['network_ms']:.1f} ms ({model})" for model, found in result["models"].items())
    lines += ["", f"The network's time, by which a client alone waits longer: {waits}."]
    rounds = ", ".join(f"{found['level_rounds']} of {model}" for model, found in result["models"].items())
    lines += ["", f"The means of levels of load that the calibration has not seen, rounds {rounds}:", "",
              "| model | clients | TTFT | TPOT | requests/s |", "| --- | --- | --- | --- | --- |"]
    for model, found in result["models"].items():
        for clients, errors in zip(CHECKS.split(","), found["fit"]["checked"]):
            figures = " | ".join(percent(errors[key]) for key in ("ttft", "tpot", "requests_per_second"))
            lines.append(f"| {model} | {clients} | {figures} |")
    return "\n".join(lines) + "\n"


def main():
    options = parse()
    folder = build(options.debug)
    options.servelab = folder / "servelab"
    models = {}
    with tempfile.TemporaryDirectory() as scratch:
        for given in options.models:
            model, _, rates = given.partition("=")
            found = measure(options, model, rates.split(","), Path(scratch))
            models[model] = {**found, "table": {rate: cells(found, rate) for rate in rates.split(",")}}
    result = {"machine": machine(), "commit": commit(), "build": folder.name, "seconds": options.seconds,
              "rounds": options.rounds, "models": models}
    keep(options.out, "compare", result, render(result))


if __name__ == "__main__":
    main()
