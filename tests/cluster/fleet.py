"""The manifests of deploy/ in the cluster, the router's view of it, and a load that must not fail."""

import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

from control_plane import ControlPlane, Refused, path_of, until
from kubelet import STUB_PORT, Kubelet, Pod
from manifests import render
from older import BEFORE, converted
from proxy import Proxy

NAMESPACE = "servelab"
ONLOOKERS = ("grafana", "prometheus", "kube-state-metrics")
SCHEMAS = Path(__file__).parents[1] / "deploy/schemas"
ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}

# Kinds that others define, as group, version, kind and plural. Rollouts have the subresource that scalers and budgets ask for.
OTHERS = [
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    ("argoproj.io", "v1alpha1", "Rollout", "rollouts"),
    ("argoproj.io", "v1alpha1", "AnalysisTemplate", "analysistemplates"),
    ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"),
    ("inference.networking.k8s.io", "v1", "InferencePool", "inferencepools"),
]


def definition(group: str, version: str, kind: str, plural: str) -> dict:
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            # Groups under k8s.io are the project's own, and want to be told that somebody agreed.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": group, "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "listKind": f"{kind}List", "singular": kind.lower()},
            "versions": [{
                "name": version, "served": True, "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": ANYTHING, "status": ANYTHING}}},
                "subresources": {"status": {}, "scale": scale} if kind == "Rollout" else {},
            }],
        },
    }


def ask(url: str, body: dict | None = None, seconds=60) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Router:
    """The router that runs in a pod, asked as a client asks it."""

    def __init__(self, pod: Pod):
        self.pod, self.base = pod, f"http://{pod.ip}:8080"

    def replicas(self) -> dict[str, dict]:
        """What it knows, by host and port."""
        known = json.loads(ask(f"{self.base}/replicas")[1])["replicas"]
        return {each["url"].removeprefix("http://"): each for each in known}

    def complete(self, number=0, streams=False) -> tuple[int, str]:
        body = {"model": "demo", "prompt": f"request {number}: what is a queue?", "max_tokens": 4, "stream": streams}
        return ask(f"{self.base}/v1/completions", body)

    def log(self) -> str:
        return self.pod.log.read_text()

    def said(self, text: str) -> bool:
        return text in self.log()


class Load:
    """Clients that ask one request after the other until told to stop; none may fail."""

    def __init__(self, router: Router, clients=3):
        self._router, self._stop = router, threading.Event()
        self.answered, self.failed = 0, []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(clients)]

    def _run(self, number):
        while not self._stop.is_set():
            number += 100
            try:
                status, text = self._router.complete(number, streams=number % 2 == 0)
                whole = status == 200 and "error" not in text[:40] and (number % 2 or "[DONE]" in text)
                failure = None if whole else f"{status} {text[-300:]}"
            # An answer that is cut is an HTTPException and no OSError.
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = repr(error)
            with self._lock:
                self.answered += 1
                if failure:
                    self.failed.append((time.strftime("%X"), failure))
            # Enough to meet every change, not so much that a small machine has nothing left for the controllers.
            time.sleep(0.02)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert not self.failed, f"{len(self.failed)} of {self.answered} failed: {self.failed[:3]}"
            assert self.answered > 10

    def goes_on(self, count=20):
        before = self.answered
        until(lambda: self.answered >= before + count, lambda: f"stuck at {self.answered}; {self.failed[:3]}")


class Fleet:
    """What a test does to the cluster, and sees of it."""

    def __init__(self, plane: ControlPlane, kubelet: Kubelet, proxy: Proxy):
        self.plane, self.api, self.kubelet, self.proxy = plane, plane.api, kubelet, proxy
        self.version = plane.binaries.version()
        served: dict[str, bool] = {}
        self._serves = lambda group: served.setdefault(group, self.api.serves(group))
        self.slices_version = "discovery.k8s.io/v1"
        if not self._serves(self.slices_version):
            self.slices_version = BEFORE[self.slices_version]

    def define_kinds(self):
        for path in sorted(SCHEMAS.glob("keda.sh_*.yaml")):
            # Created and not applied: rules in CEL, which an older server does not know, are left out.
            self.api.create(yaml.safe_load(path.read_text()))
        for each in OTHERS:
            self.api.create(definition(*each))
        for group, version, kind, plural in OTHERS:
            until(lambda: not self.api.gone(f"/apis/{group}/{version}/{plural}"), f"no {kind}")
        until(lambda: not self.api.gone("/apis/keda.sh/v1alpha1/scaledobjects"), "no ScaledObject")

    def convert(self, manifest: dict) -> tuple[dict, list[str]]:
        return converted(manifest, self.version, self._serves)

    def apply(self, overlay: str, change=lambda manifest: manifest):
        """Applies an overlay, each object changed by the caller."""
        for manifest in render(overlay):
            self.api.apply(self.convert(change(manifest))[0])

    def clear(self):
        """Deletes all that a test made, without waiting for answers to end."""
        namespaces = [each["metadata"]["name"] for each in self.api.get("/api/v1/namespaces")["items"]]
        ours = [name for name in namespaces if name != "default" and not name.startswith("kube-")]
        for name in ours:
            self.api.delete(f"/api/v1/namespaces/{name}")
        until(lambda: self._all_gone(ours), f"{ours} stay")
        self.api.delete("/apis/scheduling.k8s.io/v1/priorityclasses/servelab-serving")
        self.api.delete("/apis/node.k8s.io/v1/runtimeclasses/nvidia")
        self.proxy.watch_seconds = None
        self.proxy.passed.clear()
        self.kubelet.killed.clear()

    def _all_gone(self, namespaces: list[str]) -> bool:
        for name in namespaces:
            with contextlib.suppress(Refused):
                for pod in self.api.get(f"/api/v1/namespaces/{name}/pods")["items"]:
                    running = self.kubelet.pods.get(pod["metadata"]["uid"])
                    if running and running.process:
                        running.is_killed_by_test = True
                        running.process.kill()
                    self.api.delete(f"/api/v1/namespaces/{name}/pods/{pod['metadata']['name']}", gracePeriodSeconds=0)
        return all(self.api.gone(f"/api/v1/namespaces/{name}") for name in namespaces)

    # The fleet of the overlay `local`.

    def path(self, kind: str, name: str = "servelab", version: str = "apps/v1") -> str:
        return path_of({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}})

    def scale(self, count: int, name: str = "servelab"):
        self.api.merge(f"{self.path('Deployment', name)}/scale", {"spec": {"replicas": count}})

    def ready_pods(self, app: str = "servelab") -> list[Pod]:
        return [pod for pod in self.kubelet.named(app) if pod.ready]

    def slices(self, service: str = "servelab-replicas") -> list[dict]:
        path = f"/apis/{self.slices_version}/namespaces/{NAMESPACE}/endpointslices"
        return self.api.get(path, labelSelector=f"kubernetes.io/service-name={service}")["items"]

    def endpoints(self, service: str = "servelab-replicas") -> set[str]:
        """Where Kubernetes sends new connections."""
        found = set()
        for each in self.slices(service):
            for endpoint in each["endpoints"] or []:
                if endpoint["conditions"].get("ready") and not endpoint["conditions"].get("terminating"):
                    found |= {f"{address}:{port['port']}" for address in endpoint["addresses"] for port in each["ports"]}
        return found

    def start(self, replicas: int, change=lambda manifest: manifest) -> Router:
        """The overlay `local` without what only looks on, with that many replicas that are ready."""

        def slim(manifest: dict) -> dict:
            manifest = change(manifest)
            if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] in ONLOOKERS:
                manifest["spec"]["replicas"] = 0
            return manifest

        self.apply("local", slim)
        self.scale(replicas)
        pod = until(lambda: self.ready_pods("servelab-router"), lambda: self.why("servelab-router"))[0]
        router = Router(pod)
        self.settles(router, replicas)
        return router

    def settles(self, router: Router, count: int, seconds=90):
        """Until so many pods are ready, and the router has just those, all of them ready for it too."""
        until(lambda: len(self.ready_pods()) == count, lambda: self.why("servelab"), seconds)
        until(lambda: len(self.endpoints()) == count, lambda: f"{self.slices()}", seconds)
        self.follows(router, seconds)

    def follows(self, router: Router, seconds=15):
        """Until the router has just what Kubernetes has, and finds it ready."""
        until(lambda: self.same(router), lambda: f"{self.endpoints()} and {router.replicas()}; {router.log()[-2000:]}", seconds)

    def same(self, router: Router) -> bool:
        known = router.replicas()
        return known.keys() == self.endpoints() and all(each["health"] == "ready" for each in known.values())

    def why(self, app: str) -> str:
        log = lambda pod: pod.log.read_text()[-1000:] if pod.log.exists() else ""  # noqa: E731
        pods = [(pod.name, pod.ip, pod.ready, log(pod)) for pod in self.kubelet.named(app)]
        conditions = self.api.get(self.path("Deployment", app)).get("status")
        return f"{pods} {conditions} {self.plane.controllers.text()[-1500:]}"

    def stubs(self, count: int, name: str = "stub"):
        """That many more replicas behind the same service, with nothing behind them."""
        labels = {"app.kubernetes.io/name": "servelab", "stub": name}
        container = {"name": "stub", "image": "stub", "ports": [{"name": "http", "containerPort": STUB_PORT}]}
        pod = {"containers": [container], "terminationGracePeriodSeconds": 0}
        self.api.apply({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "replicas": count, "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        })
