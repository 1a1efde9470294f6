#!/usr/bin/env python3
"""What the router costs: latency that it adds, requests it carries, processor time of each, beside other proxies.

    benches/routing/overhead.py [OUT_FOLDER] [--sglang-router CMD] [--nginx CMD] [--rounds N] [--seconds S] [--debug]

Two backends with nothing to do (crates/router/examples/instant_server.rs: an answer at once) stand behind every proxy;
`servelab bench` is the client. All share the machine's cores. The targets take turns round by round, so that a change
in the machine's load meets all of them. For each target and round:

- closed loop, CLIENTS clients, answers of one token: requests a second, and the proxy's processor time of each
- open loop at half the rate that the proxy carried just before, with it and without it: time to the first token, p50 and
  p99; what a proxy adds is the difference. Many short rounds rather than few long ones: on a machine that others use as
  well a stall of some milliseconds decides the p99 of the load that it falls into, so most are to be without one
- closed loop, streams of TOKENS tokens: the proxy's processor time of a token

`--sglang-router` is the launcher of the PyPI package sglang-router (`smg launch`), nginx Debian's nginx-light; one that
is not there is left out, and the table says so. OUT_FOLDER (default benches/results/router/overhead) gets
overhead.json and overhead.md. Ends by itself, in about seven minutes by default.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from programs import ROOT, Running, bench_metrics, build, commit, free_port, keep, listening, machine  # noqa: E402

CLIENTS = 128
PROMPT_TOKENS = 128
TOKENS = 64

NGINX = """
daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  upstream replicas {{ {servers} keepalive 256; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; client_max_body_size 8m; client_body_buffer_size 1m;
    }}
  }}
}}
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "benches/results/router/overhead")
    parser.add_argument("--sglang-router", default="smg launch", metavar="CMD")
    parser.add_argument("--nginx", default="nginx", metavar="CMD")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=2, help="of each load")
    parser.add_argument("--debug", action="store_true", help="take the debug build, to try this program itself")
    return parser.parse_args()


def answers(url, seconds=60):
    """Waits until a completion passes."""
    body = json.dumps({"model": "instant", "prompt": "one two", "max_tokens": 1, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                if b"[DONE]" in answer.read():
                    return True
        except OSError:
            time.sleep(0.2)
    return False


def start_servelab(options, replicas, scratch):
    command = [options.servelab, "route", "--port", 0]
    for url in replicas:
        command += ["--replica", url]
    return listening(command)


def start_sglang(options, replicas, scratch):
    port = free_port()
    command = [*shlex.split(options.sglang_router), "--host", "127.0.0.1", "--port", port, "--worker-urls", *replicas,
               "--prometheus-port", free_port(), "--log-level", "error"]
    with open(scratch / "sglang.log", "w") as log:
        return Running(command, stdout=log, stderr=log), f"http://127.0.0.1:{port}"


def start_nginx(options, replicas, scratch):
    port = free_port()
    folder = scratch / "nginx"
    folder.mkdir()
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in replicas)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, servers=servers))
    command = [*shlex.split(options.nginx), "-p", folder, "-c", folder / "nginx.conf"]
    with open(scratch / "nginx.log", "w") as log:
        return Running(command, stdout=log, stderr=log), f"http://127.0.0.1:{port}"


DIRECT = "no proxy"
OURS = (DIRECT, "servelab route")
PROXIES = {"servelab route": start_servelab, "sglang-router": start_sglang, "nginx": start_nginx}


def version(name, options):
    if name == "servelab route":
        return subprocess.run([options.servelab, "--version"], capture_output=True, text=True).stdout.strip()
    if name == "nginx":
        shown = subprocess.run([*shlex.split(options.nginx), "-v"], capture_output=True, text=True)
        return (shown.stderr or shown.stdout).strip().removeprefix("nginx version: ")
    python = Path(shutil.which(shlex.split(options.sglang_router)[0])).parent / "python"
    program = "import importlib.metadata as m; print(m.version('sglang-router'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()


def load(options, url, proxy, tokens, how, is_ours=True):
    """One load; a peer may fail requests, which are counted. Everything sent is measured, so that it can be held against the processor time."""
    command = [options.servelab, "bench", "--url", url, "--input-tokens", PROMPT_TOKENS,
               "--output-tokens", tokens, "--duration", f"{options.seconds:g}s", "--repeats", 1, "--warm-up", 0,
               "--no-cool-down", "--json", "--quiet", *how]
    before = proxy.cpu_seconds() if proxy else 0.0
    metrics = bench_metrics(command)
    used = (proxy.cpu_seconds() if proxy else 0.0) - before
    if not metrics["completed"] or metrics["failed"] and is_ours:
        sys.exit(f"{metrics['failed']} requests failed, {metrics['completed']} did not, at {url}")
    ttft = metrics["ttft_from_send_ms"]
    return {
        "requests_per_second": metrics["request_throughput"],
        "completed": metrics["completed"],
        "failed": metrics["failed"],
        "cpu_microseconds_per_request": 1e6 * used / metrics["completed"] if proxy else None,
        "ttft_p50_ms": ttft["median"],
        "ttft_p99_ms": ttft["p99"],
    }


def order(items, number):
    """Another first one each round."""
    at = number % len(items)
    return items[at:] + items[:at]


def measure(options, scratch):
    backends = [listening([options.backend]) for _ in range(2)]
    replicas = [url for _, url in backends]
    running = [process for process, _ in backends]
    targets, left_out = {DIRECT: (None, replicas[0])}, {}
    try:
        for name, start in PROXIES.items():
            program = {"sglang-router": options.sglang_router, "nginx": options.nginx}.get(name)
            if program and not shutil.which(shlex.split(program)[0]):
                left_out[name] = "is not installed here"
                continue
            process, url = start(options, replicas, scratch)
            running.append(process)
            if answers(url):
                targets[name] = (process, url)
            elif name == "servelab route":
                sys.exit("the router does not answer")
            else:
                left_out[name] = "does not answer here"
        rounds = []
        for number in range(options.rounds):
            found = {name: {} for name in targets}

            def take(name, kind, tokens, how, of=None):
                process, url = targets[of or name]
                found[name][kind] = load(options, url, process, tokens, how, name in OURS)

            closed = ["--concurrency", CLIENTS]
            for name in order(list(targets), number):
                take(name, "saturated", 1, closed)
                if name != DIRECT:
                    # Half of what it has just carried, and the same without it, before the machine changes its pace.
                    half = ["--rate", f"{found[name]['saturated']['requests_per_second'] / 2:.1f}"]
                    for kind, of in order([("half", name), ("direct", DIRECT)], number):
                        take(name, kind, 1, half, of)
                take(name, "streams", TOKENS, closed)
            print(number + 1, json.dumps(found), file=sys.stderr, flush=True)
            rounds.append(found)
        versions = {name: version(name, options) for name in targets if name != DIRECT}
        return {"rounds": rounds, "versions": versions, "left_out": left_out}
    finally:
        for process in reversed(running):
            process.stop()


def cells(rounds, name):
    """What the table shows of a target: the median over the rounds."""
    middle = lambda values: statistics.median(list(values))
    of = lambda load, key: middle(found[name][load][key] for found in rounds)
    loads = [load for load in rounds[0][name] if load != "direct"]
    row = {
        "requests_per_second": of("saturated", "requests_per_second"),
        "failed": sum(found[name][load]["failed"] for found in rounds for load in loads),
        "stream_tokens_per_second": TOKENS * of("streams", "requests_per_second"),
    }
    if name != DIRECT:
        row["rate_at_half"] = of("half", "requests_per_second")
        for quantile in ("p50", "p99"):
            key = f"ttft_{quantile}_ms"
            added = [found[name]["half"][key] - found[name]["direct"][key] for found in rounds]
            row[f"added_{quantile}_ms"] = middle(added)
            row[f"added_{quantile}_ms_range"] = [min(added), max(added)]
        row["cpu_us_saturated"] = of("saturated", "cpu_microseconds_per_request")
        row["cpu_us_half"] = of("half", "cpu_microseconds_per_request")
        per_token = [
            (found[name]["streams"]["cpu_microseconds_per_request"] - found[name]["saturated"]["cpu_microseconds_per_request"])
            / (TOKENS - 1)
            for found in rounds
        ]
        row["cpu_us_per_token"] = middle(per_token)
    return row


def render(result):
    number = lambda value, digits: "-" if value is None else f"{value:,.{digits}f}"
    spread = lambda row, key: "-" if key not in row else "{:.2f} ({:.2f} to {:.2f})".format(row[key], *row[f"{key}_range"])
    lines = [
        f"{result['rounds_run']} rounds of {result['seconds']:g} s a load, {result['machine']}, {CLIENTS} clients, prompts of "
        f"{PROMPT_TOKENS} tokens; client, proxy and two backends on the same cores. Medians over the rounds, in brackets "
        f"the least and the most. Half is of what the proxy itself carried; what it adds is over the same load without it.",
        "",
        "| | requests/s at saturation | CPU us a request | at half: requests/s | CPU us a request | added p50, ms | "
        "added p99, ms | CPU us a streamed token | failed requests |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["table"].items():
        version = result["versions"].get(name)
        lines.append("| " + " | ".join([
            name + (f" ({version})" if version else ""),
            number(row["requests_per_second"], 0),
            number(row.get("cpu_us_saturated"), 0),
            number(row.get("rate_at_half"), 0),
            number(row.get("cpu_us_half"), 0),
            spread(row, "added_p50_ms"),
            spread(row, "added_p99_ms"),
            number(row.get("cpu_us_per_token"), 1),
            number(row["failed"], 0),
        ]) + " |")
    lines += ["", *(f"{name} {why}." for name, why in result["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def main():
    options = parse()
    folder = build(options.debug)
    options.servelab, options.backend = folder / "servelab", folder / "examples/instant_server"
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    result = {
        "machine": machine(), "commit": commit(), "build": folder.name, "seconds": options.seconds, "rounds_run": options.rounds,
        "clients": CLIENTS, "prompt_tokens": PROMPT_TOKENS, "stream_tokens": TOKENS,
        **found,
        "table": {name: cells(found["rounds"], name) for name in (DIRECT, *PROXIES) if name in found["rounds"][0]},
    }
    keep(options.out, "overhead", result, render(result))


if __name__ == "__main__":
    main()
