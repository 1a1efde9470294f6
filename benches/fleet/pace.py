#!/usr/bin/env python3
"""How many requests a minute `servelab sim` simulates on one core, and what a fleet of a thousand replicas takes.

    benches/fleet/pace.py [OUT_FOLDER] [--rounds N] [--beside BINARY] [--debug]

Llama-3.1-8B on H100s, the lengths of azure-chat, 16 replicas at 100 requests a second for 20 minutes of virtual time, one
process on one core. With --beside another build takes turns, run by run: the pace of a shared machine changes by half within
an hour. OUT_FOLDER (default benches/results/fleet) gets pace.json and pace.md. Ends by itself, in about two minutes by
default.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from programs import ROOT, build, commit, keep, machine  # noqa: E402

FLEET = ["--model", "llama-3.1-8b", "--hardware", "h100", "--workload", "azure-chat"]
USUAL = ["--replicas", "16", "--rate", "100", "--duration", "20m"]
LARGE = ["--replicas", "1000", "--rate", "6000", "--duration", "30s"]
CORE = "1"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "benches/results/fleet")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--beside", type=Path, help="another build of servelab")
    parser.add_argument("--debug", action="store_true", help="take the debug build, to try this program itself")
    return parser.parse_args()


def simulated(servelab, load):
    """Requests a minute, and the most memory of the run in MiB."""
    command = ["taskset", "--cpu-list", CORE, str(servelab), "sim", *FLEET, *load]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    found = re.search(r"([\d,]+) a minute", said)
    if status or not found:
        sys.exit(f"{command} ended with {status}:\n{said}")
    return int(found[1].replace(",", "")), used.ru_maxrss / 1024


def main():
    options = parse()
    builds = {"this": build(options.debug) / "servelab"}
    if options.beside:
        builds["beside"] = options.beside
    paces = {name: [] for name in builds}
    for _ in range(options.rounds):
        for name, servelab in builds.items():
            paces[name].append(simulated(servelab, USUAL)[0])
    large_pace, large_mebibytes = simulated(builds["this"], LARGE)
    result = {"machine": machine(), "commit": commit(), "fleet": FLEET + USUAL, "requests_a_minute": paces,
              "large_fleet": LARGE, "large_requests_a_minute": large_pace, "large_mebibytes": large_mebibytes}
    lines = [f"{options.rounds} rounds on one of {machine()}: `servelab sim {' '.join(FLEET + USUAL)}`.", "",
             "| build | requests a minute, median | least | most |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {statistics.median(all_of_it):,.0f} | {min(all_of_it):,} | {max(all_of_it):,} |"
              for name, all_of_it in paces.items()]
    lines += ["", f"`{' '.join(LARGE)}`: {large_pace:,} a minute in {large_mebibytes:,.0f} MiB."]
    keep(options.out, "pace", result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
