#!/usr/bin/env python3
"""What a replica's front end carries: HTTP, tokenizer, scheduler and streams around a device that takes no time.

    benches/front_end/ceiling.py [OUT_FOLDER] [--rounds N] [--seconds S] [--debug]

`servelab serve --device sim --speed inf` runs on one core, `servelab bench` on another, in closed loops of CLIENTS clients:
answers of one token for requests a second, answers of TOKENS tokens, streamed, for tokens a second. The same server
stands there a second time with every request traced to a collector that throws all of it away, so that the two tell what
tracing costs. They take turns round by round. OUT_FOLDER (default benches/results/front_end) gets ceiling.json and
ceiling.md. Ends by itself, in about two minutes by default.
"""

import argparse
import http.server
import json
import statistics
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from programs import ROOT, bench_metrics, build, commit, keep, machine, ready  # noqa: E402

CLIENTS = 64
PROMPT_TOKENS = 32
TOKENS = 256
SERVER_CORE, CLIENT_CORE = "0", "1"
PROTOBUF = {"content-type": "application/x-protobuf"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "benches/results/front_end")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each load")
    parser.add_argument("--debug", action="store_true", help="take the debug build, to try this program itself")
    return parser.parse_args()


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans over OTLP/HTTP and answers, as the protocol wants it, with an empty message."""

    protocol_version = "HTTP/1.1"
    taken = 0

    def do_POST(self):
        Collector.taken += len(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        for name, value in PROTOBUF.items():
            self.send_header(name, value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def start(servelab, more):
    command = ["taskset", "--cpu-list", SERVER_CORE, servelab, "serve", "--device", "sim", "--hardware", "h100", "--model",
               "llama-3.1-8b", "--speed", "inf", "--port", "0", "--log-level", "warn"]
    return ready([*command, *more])


def load(options, url, server, tokens):
    command = ["taskset", "--cpu-list", CLIENT_CORE, options.servelab, "bench", "--url", url, "--concurrency", CLIENTS,
               "--input-tokens", PROMPT_TOKENS, "--output-tokens", tokens, "--ignore-eos", "--duration",
               f"{options.seconds:g}s", "--repeats", 1, "--warm-up", 0, "--no-cool-down", "--json", "--quiet"]
    before = server.cpu_seconds()
    metrics = bench_metrics(command)
    used = server.cpu_seconds() - before
    if metrics["failed"] or not metrics["completed"]:
        sys.exit(f"{metrics['failed']} requests failed, {metrics['completed']} did not, at {url}")
    return {
        "requests_per_second": metrics["request_throughput"],
        "tokens_per_second": metrics["output_throughput"],
        "cpu_microseconds_per_request": 1e6 * used / metrics["completed"],
        "server_busy": used / metrics["completed"] * metrics["request_throughput"],
    }


def measure(options, collector):
    traced = ["--otlp-endpoint", f"http://127.0.0.1:{collector}", "--otlp-protocol", "http", "--trace-sample-ratio", "1"]
    servers = {}
    rounds = []
    try:
        servers["untraced"] = start(options.servelab, [])
        servers["every request traced"] = start(options.servelab, traced)
        for number in range(options.rounds):
            found = {}
            order = list(servers) if number % 2 == 0 else list(reversed(servers))
            for name in order:
                server, url = servers[name]
                found[name] = {kind: load(options, url, server, tokens) for kind, tokens in (("short", 1), ("long", TOKENS))}
                print(number + 1, name, json.dumps(found[name]), file=sys.stderr, flush=True)
            rounds.append(found)
        return rounds
    finally:
        for server, _ in servers.values():
            server.stop()


def cells(rounds, name):
    of = lambda kind, key: statistics.median(found[name][kind][key] for found in rounds)
    short, long = of("short", "cpu_microseconds_per_request"), of("long", "cpu_microseconds_per_request")
    return {
        "requests_per_second": of("short", "requests_per_second"),
        "cpu_us_per_request": short,
        "server_busy_short": of("short", "server_busy"),
        "tokens_per_second": of("long", "tokens_per_second"),
        "cpu_us_per_token": (long - short) / (TOKENS - 1),
        "server_busy_long": of("long", "server_busy"),
    }


def render(result):
    lines = [
        f"{len(result['rounds'])} rounds of {result['seconds']:g} s a load, {result['machine']}: the server on one core, the client on "
        f"another; {CLIENTS} clients, prompts of {PROMPT_TOKENS} tokens, streamed. Medians over the rounds.",
        "",
        f"| | requests/s, answers of 1 token | CPU us a request | core busy | tokens/s, answers of {TOKENS} | CPU us a token | core "
        "busy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["table"].items():
        lines.append(
            f"| {name} | {row['requests_per_second']:,.0f} | {row['cpu_us_per_request']:.0f} | {100 * row['server_busy_short']:.0f} % | "
            f"{row['tokens_per_second']:,.0f} | {row['cpu_us_per_token']:.2f} | {100 * row['server_busy_long']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main():
    options = parse()
    folder = build(options.debug)
    options.servelab = folder / "servelab"
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    rounds = measure(options, collector.server_port)
    if not Collector.taken:
        sys.exit("the collector was sent nothing: the traced server did not trace")
    result = {
        "machine": machine(), "commit": commit(), "build": folder.name, "seconds": options.seconds, "clients": CLIENTS,
        "prompt_tokens": PROMPT_TOKENS, "tokens": TOKENS, "rounds": rounds,
        "table": {name: cells(rounds, name) for name in rounds[0]},
    }
    keep(options.out, "ceiling", result, render(result))


if __name__ == "__main__":
    main()
