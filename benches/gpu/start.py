"""From the start of `servelab serve` to its first token, and the stages that /metrics tells. Prints JSON."""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request

PATIENCE_SECONDS = 600


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("binary")
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--model", default="llama-3.1-8b")
    options = arguments.parse_args()
    command = [options.binary, "serve", "--model", options.model, "--load-format", "dummy", "--device", options.device]
    command += ["--port", "0", "--max-model-len", "2048", "--served-model-name", "start"]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        url = line.removeprefix("listening on ").strip()
        if not url.startswith("http"):
            sys.exit(f"no address: {line!r}")
        listening = time.monotonic() - began
        while True:
            try:
                get(f"{url}/ready")
                break
            except OSError:
                if server.poll() is not None or time.monotonic() - began > PATIENCE_SECONDS:
                    sys.exit("the server does not get ready")
                time.sleep(0.01)
        ready = time.monotonic() - began
        body = {"model": "start", "prompt": [1, 2, 3, 4], "max_tokens": 1, "ignore_eos": True}
        get(f"{url}/v1/completions", body)
        first_token = time.monotonic() - began
        metrics = get(f"{url}/metrics")
        stages = dict(re.findall(r'model_load_seconds\{[^}]*stage="(\w+)"[^}]*\} (\S+)', metrics))
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
    seconds = {"listening": listening, "ready": ready, "first_token": first_token}
    result = {"command": command[1:], "seconds": seconds, "stages": {k: float(v) for k, v in stages.items()}}
    json.dump(result, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
