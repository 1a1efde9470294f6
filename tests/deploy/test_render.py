"""dashboards/render.py against a Prometheus that has one series for every question."""

import json
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from manifests import REPOSITORY

DASHBOARDS = sorted((REPOSITORY / "dashboards").glob("*.json"))


@pytest.fixture
def prometheus():
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            parameters = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
            asked.append(parameters["query"][0])
            start, end = float(parameters["start"][0]), float(parameters["end"][0])
            values = [[start, "1"], [(start + end) / 2, "NaN"], [end, "3"]]
            result = [{"metric": {"instance": "a", "stage": "read"}, "values": values}]
            body = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_is_drawn(prometheus, tmp_path, dashboard):
    url, asked = prometheus
    out = tmp_path / "out.png"
    script = REPOSITORY / "dashboards/render.py"
    command = [sys.executable, "-B", script, dashboard, out, "--url", url, "--last", "2m"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    panels = json.loads(dashboard.read_text())["panels"]
    assert len(asked) == sum(len(panel.get("targets", [])) for panel in panels)
    assert not any("$" in query for query in asked)
