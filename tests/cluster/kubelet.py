"""Plays the scheduler and the kubelet: binds pods, runs those of this repository as real processes, and says how they are.

Every pod has an address of its own. Pods of the image `servelab` run the binary with the pod's own arguments, settings,
service account and grace period, and are probed as the manifest says; pods of the image `stub` are one small server for
all of them; of others it is only said that they run."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from control_plane import ControlPlane, Refused
from proxy import PROXY_ADDRESS, PROXY_PORT

NODE = "node-1"
STUB_PORT = 9000
ACCOUNT_FOLDER = "kubernetes.io/serviceaccount"
# What the pod sees of its service account, in a view of the file system that only it has.
AS_A_POD = """
mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io && ln -s "$0" /run/secrets/kubernetes.io/serviceaccount &&
exec "$@"
"""


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Pod:
    """A pod that was bound to the node."""

    def __init__(self, kubelet: "Kubelet", pod: dict, ip: str):
        self.kubelet, self.pod, self.ip = kubelet, pod, ip
        meta = pod["metadata"]
        self.path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        self.name, self.container = meta["name"], pod["spec"]["containers"][0]
        self.process, self.ends = None, threading.Event()
        # What a test says of its readiness, whatever the probe says.
        self.unready = False
        # Its process ends as it should not, since a test is over.
        self.is_killed_by_test = False
        self.ready = False
        self.folder = kubelet.folder / meta["uid"]
        threading.Thread(target=self._live, daemon=True).start()

    @property
    def is_ours(self) -> bool:
        return self.container["image"].startswith("servelab:")

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def _live(self):
        try:
            if self.is_ours:
                self._start()
            self._watch_over()
            self._terminate()
        except (OSError, Refused):
            # Deleted by force meanwhile, with its namespace or with the whole cluster.
            if not self.ends.wait(10):
                raise
        finally:
            if self.process and self.process.poll() is None:
                self.process.kill()

    def _start(self):
        self.folder.mkdir()
        spec, namespace = self.pod["spec"], self.pod["metadata"]["namespace"]
        arguments = [*self.container["args"]]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            config = volumes[mount["name"]].get("configMap")
            if not config:
                continue
            mounted = self.folder / mount["name"]
            mounted.mkdir()
            data = self.kubelet.api.get(f"/api/v1/namespaces/{namespace}/configmaps/{config['name']}")["data"]
            for name, text in data.items():
                (mounted / name).write_text(text)
            arguments = [each.replace(mount["mountPath"], str(mounted)) for each in arguments]
        command = [self.kubelet.binary, *arguments, "--host", self.ip]
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBERNETES_SERVICE_HOST": PROXY_ADDRESS,
                       "KUBERNETES_SERVICE_PORT": str(PROXY_PORT)}
        if any(ACCOUNT_FOLDER in mount["mountPath"] for mount in self.container["volumeMounts"]):
            self.project_token()
            command = ["unshare", "--mount", "sh", "-c", AS_A_POD, self.folder / "account", *command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def project_token(self):
        """Writes the service account's token, bound to this pod, as the kubelet does anew before it expires."""
        account = self.folder / "account"
        account.mkdir(exist_ok=True)
        namespace = self.pod["metadata"]["namespace"]
        name = self.pod["spec"]["serviceAccountName"]
        (account / "token.new").write_text(self.kubelet.plane.account_token(namespace, name, self.pod))
        (account / "token.new").rename(account / "token")
        (account / "ca.crt").write_bytes(self.kubelet.plane.certificates.authority.read_bytes())
        (account / "namespace").write_text(namespace)

    def _watch_over(self):
        """Probes it until it is to end."""
        probe = self.container.get("readinessProbe", {})
        period, limit = probe.get("periodSeconds", 10), probe.get("failureThreshold", 3)
        failures, told = 0, None
        while not self.ends.is_set():
            failures = 0 if self._answers(probe) else failures + 1
            was_ready = self.ready
            self.ready = not self.unready and (failures == 0 or (was_ready and failures < limit))
            if self.ready != told:
                self._tell()
                told = self.ready
            # Until it is ready the first time, the start-up probe asks more often.
            self.ends.wait(min(period, 0.5) if not self.ready else min(period, 1))

    def _answers(self, probe: dict) -> bool:
        if not self.is_ours:
            return True
        if self.process.poll() is not None:
            return False
        port = next(port["containerPort"] for port in self.container["ports"] if port["name"] == probe["httpGet"]["port"])
        try:
            with urllib.request.urlopen(f"http://{self.ip}:{port}{probe['httpGet']['path']}", timeout=2):
                return True
        except OSError:
            return False

    def _tell(self):
        state = {"running": {"startedAt": now()}}
        status = "True" if self.ready else "False"
        conditions = [{"type": kind, "status": "True", "lastTransitionTime": now()} for kind in ("PodScheduled", "Initialized")]
        conditions += [{"type": kind, "status": status, "lastTransitionTime": now()} for kind in ("ContainersReady", "Ready")]
        containers = [
            {"name": each["name"], "image": each["image"], "imageID": each["image"], "containerID": f"test://{self.name}",
             "ready": self.ready, "started": self.ready, "restartCount": 0, "state": state, "lastState": {}}
            for each in self.pod["spec"]["containers"]
        ]
        body = {"status": {"phase": "Running", "podIP": self.ip, "podIPs": [{"ip": self.ip}], "hostIP": "10.64.0.1",
                           "startTime": now(), "conditions": conditions, "containerStatuses": containers}}
        self.kubelet.api.merge(f"{self.path}/status", body)

    def _terminate(self):
        grace = self.pod["spec"]["terminationGracePeriodSeconds"]
        deadline = time.monotonic() + grace
        if self.process:
            hook = self.container.get("lifecycle", {}).get("preStop", {})
            pause = hook["sleep"]["seconds"] if "sleep" in hook else int(hook["exec"]["command"][1]) if hook else 0
            time.sleep(pause)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                self.kubelet.killed.append(self.name)
                self.process.kill()
                self.process.wait()
            if self.process.returncode and not self.is_killed_by_test:
                self.kubelet.killed.append(f"{self.name} ended with {self.process.returncode}")
        self.kubelet.api.delete(self.path, gracePeriodSeconds=0)


class Kubelet:
    """Follows all pods until it is stopped."""

    def __init__(self, plane: ControlPlane, binary: Path, folder: Path):
        self.plane, self.api, self.binary, self.folder = plane, plane.api, binary, folder
        self.pods: dict[str, Pod] = {}
        # Pods whose process did not end in its grace period, or not well.
        self.killed: list[str] = []
        self._addresses = (f"10.64.{third}.{fourth}" for third in range(1, 255) for fourth in range(1, 255))
        self._stopped = threading.Event()
        self.api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        self._stub = stub()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stopped.wait(0.1):
            # An API server that restarts, or a pod that goes meanwhile.
            with contextlib.suppress(OSError, Refused, ValueError):
                self._look()

    def _look(self):
        there = {pod["metadata"]["uid"]: pod for pod in self.api.get("/api/v1/pods")["items"]}
        for uid, pod in there.items():
            meta = pod["metadata"]
            if uid not in self.pods and "deletionTimestamp" not in meta:
                if "nodeName" not in pod["spec"]:
                    self._bind(pod)
                self.pods[uid] = Pod(self, pod, next(self._addresses))
            elif uid in self.pods and "deletionTimestamp" in meta:
                self.pods[uid].ends.set()
            elif uid not in self.pods:
                self.api.delete(f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}", gracePeriodSeconds=0)
        for uid in self.pods.keys() - there.keys():
            self.pods.pop(uid).ends.set()

    def _bind(self, pod: dict):
        meta = pod["metadata"]
        target = {"kind": "Node", "name": NODE}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": meta["name"]}, "target": target}
        self.api.ask("POST", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/binding", binding)

    def named(self, app: str) -> list[Pod]:
        """Pods of that name's label that are not about to end."""
        label = "app.kubernetes.io/name"
        alive = [pod for pod in list(self.pods.values()) if not pod.ends.is_set()]
        return [pod for pod in alive if pod.pod["metadata"].get("labels", {}).get(label) == app]

    def stop(self):
        self._stopped.set()
        self._thread.join()
        for pod in self.pods.values():
            if pod.process and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()
        self._stub.shutdown()
        self._stub.server_close()


def stub() -> ThreadingHTTPServer:
    """A replica at every address, with nothing behind it."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._say(200 if self.path == "/health" else 404, b"{}")

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/completions":
                return self._say(404, b"{}")
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            answer = json.dumps({"id": "x", "object": "text_completion", "created": 0, "model": "demo", "choices": [choice]})
            if asked["stream"]:
                self._say(200, f"data: {answer}\n\ndata: [DONE]\n\n".encode(), "text/event-stream")
            else:
                self._say(200, answer.encode())

        def _say(self, status, text, content="application/json"):
            self.send_response(status)
            self.send_header("content-type", content)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024

        def handle_error(self, request, address):
            """A router that goes breaks its connections."""

    server = Server(("0.0.0.0", STUB_PORT), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
