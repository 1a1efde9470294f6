"""Seconds from the start of the process to the first token of a streamed chat with the embedded demo model.

    python cold_start.py target/release/servelab [RUNS]

The client asks again every 3 ms until it is answered, so that the figure is at most that much too large.
"""

import http.client
import json
import statistics
import subprocess
import sys
import time

BODY = json.dumps({"model": "demo", "stream": True, "messages": [{"role": "user", "content": "What is TTFT?"}]})


def port_of(server: subprocess.Popen) -> int:
    """`listening on http://127.0.0.1:PORT` is the first line on standard output."""
    return int(server.stdout.readline().decode().rsplit(":", 1)[1])


def first_token(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/v1/chat/completions", BODY, {"content-type": "application/json"})
    answer = connection.getresponse()
    while answer.status == 200 and (line := answer.readline()):
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            return True
    return False


def one_start(binary: str) -> float:
    start = time.perf_counter()
    server = subprocess.Popen([binary, "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        port = port_of(server)
        while not first_token(port):
            time.sleep(0.003)
        return time.perf_counter() - start
    finally:
        server.terminate()
        server.wait()


seconds = sorted(one_start(sys.argv[1]) for _ in range(int((sys.argv[2:] or ["11"])[0])))
print(json.dumps({"median": round(statistics.median(seconds), 3), "seconds": [round(s, 3) for s in seconds]}))
