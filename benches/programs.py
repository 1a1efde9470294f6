"""What the benchmarks that start programs share."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
TICK = os.sysconf("SC_CLK_TCK")


class Running:
    """A process and its children, ended together; how much processor time they took."""

    def __init__(self, command, **more):
        self.process = subprocess.Popen([str(part) for part in command], start_new_session=True, **more)

    def processes(self):
        """All of its session, by /proc."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid:
                    yield fields

    def cpu_seconds(self):
        return sum(int(fields[11]) + int(fields[12]) for fields in self.processes()) / TICK

    def stop(self):
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def build(is_debug):
    """The folder of the programs. All are built at once: with other features each switch would build half of them anew."""
    if not is_debug:
        command = ["cargo", "build", "--quiet", "--release", "--workspace", "--bin", "servelab", "--example", "instant_server"]
        subprocess.run(command, cwd=ROOT, check=True)
    return TARGET / ("debug" if is_debug else "release")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def listening(command):
    """A program of ours, started, and the address that it prints."""
    running = Running(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in running.process.stdout:
        if line.startswith("listening on "):
            return running, line.split()[2]
    sys.exit(f"{command[0]} did not start")


def ready(command, seconds=60):
    """A server of ours that takes requests: it listens before its model is loaded."""
    running, url = listening(command)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=10):
                return running, url
        except OSError:
            time.sleep(0.05)
    running.stop()
    sys.exit(f"{url} did not get ready")


def bench_metrics(command):
    """What `servelab bench --json` measured at its only level of load.

    Exit code 1 says that the client was late, which a machine whose cores are all busy makes it; the figures say how."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(f"the load generator ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)["points"][0]["metrics"]


def keep(folder, name, result, table):
    """Writes what was measured and the table of it, and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)


def machine():
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def commit():
    """Of the working tree, shortened."""
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout.strip()
