"""Starts the servelab binary on a free port for the tests of a module."""

import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

PATIENCE_SECONDS = 120


def pytest_addoption(parser):
    parser.addoption("--binary", required=True, help="path of the servelab binary")


class Server:
    """A running `servelab serve`, or another command that serves; a context manager."""

    def __init__(self, binary: Path, *flags: str, command: str = "serve"):
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [binary, command, "--port", "0", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        first = self._process.stdout.readline()
        if not first.startswith("listening on "):
            self.stop()
            raise RuntimeError(f"no address but {first!r}; {self.log()}")
        self.base = first.removeprefix("listening on ").strip()
        self._wait_until_ready()

    def log(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def stop(self):
        self._process.terminate()
        self._process.wait(timeout=PATIENCE_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _wait_until_ready(self):
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.base}/ready", timeout=10).close()
                return
            except urllib.error.HTTPError:
                pass
            if time.monotonic() > end or self._process.poll() is not None:
                self.stop()
                raise RuntimeError(f"never ready; {self.log()}")
            time.sleep(0.02)


@pytest.fixture(scope="session")
def start(request):
    """Starts a server with the given flags, or a router with `command="route"`."""
    binary = Path(request.config.getoption("--binary")).resolve()
    return lambda *flags, **which: Server(binary, *flags, **which)


@pytest.fixture(scope="module")
def server(start):
    with start() as server:
        yield server
