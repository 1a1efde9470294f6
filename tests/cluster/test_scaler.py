"""The HPA of components/hpa, decided by the real controller on metrics that the test serves."""

import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from control_plane import until
from fleet import NAMESPACE
from manifests import KUSTOMIZE, read

METRICS_ADDRESS = "10.64.0.3"
GROUP = "custom.metrics.k8s.io"
SERVICE = {"namespace": NAMESPACE, "name": "metrics"}


class Metrics:
    """The custom metrics API, as prometheus-adapter offers it: one value for every pod that is ready."""

    def __init__(self, cluster):
        self.value, self.asked = 0, []
        metrics = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = json.dumps(metrics.answer(self.path, cluster)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cluster.plane.certificates.server, cluster.plane.certificates.key)
        self._server = ThreadingHTTPServer((METRICS_ADDRESS, 443), Answer)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, cluster) -> dict:
        version = f"{GROUP}/v1beta1"
        if "/namespaces/" not in path:
            resource = {"name": "pods/held_requests", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": [resource]}
        self.asked.append(path)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        items = [
            {"describedObject": {"kind": "Pod", "namespace": NAMESPACE, "name": pod.name, "apiVersion": "/v1"},
             "metricName": "held_requests", "timestamp": now, "value": str(self.value), "selector": None}
            for pod in cluster.ready_pods()
        ]
        return {"kind": "MetricValueList", "apiVersion": version, "metadata": {}, "items": items}

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def metrics(empty):
    metrics = Metrics(empty)
    yield metrics
    empty.api.delete(f"/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.{GROUP}")
    metrics.stop()


def offer(cluster):
    service = {"apiVersion": "v1", "kind": "Service", "metadata": SERVICE, "spec": {"ports": [{"name": "https", "port": 443}]}}
    subset = {"addresses": [{"ip": METRICS_ADDRESS}], "ports": [{"name": "https", "port": 443}]}
    cluster.api.create(service)
    cluster.api.create({"apiVersion": "v1", "kind": "Endpoints", "metadata": SERVICE, "subsets": [subset]})
    spec = {"group": GROUP, "version": "v1beta1", "service": SERVICE, "insecureSkipTLSVerify": True,
            "groupPriorityMinimum": 100, "versionPriority": 100}
    cluster.api.create({"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
                        "metadata": {"name": f"v1beta1.{GROUP}"}, "spec": spec})
    path = f"/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.{GROUP}"

    def available():
        conditions = cluster.api.get(path).get("status", {}).get("conditions", [])
        return any(each["type"] == "Available" and each["status"] == "True" for each in conditions)

    until(available, lambda: cluster.api.get(path))


def test_the_hpa_follows_what_the_replicas_hold(empty, metrics):
    router = empty.start(replicas=1)
    offer(empty)
    (hpa,) = read(KUSTOMIZE / "components/hpa/hpa.yaml")
    hpa["metadata"]["namespace"] = NAMESPACE
    changed, notes = empty.convert(hpa)
    print(notes)
    empty.api.apply(changed)
    path = empty.path("HorizontalPodAutoscaler", "servelab", changed["apiVersion"])

    def status():
        return empty.api.get(path).get("status", {})

    def conditions():
        return {each["type"]: (each["status"], each["reason"]) for each in status().get("conditions") or []}

    metrics.value = 4
    until(lambda: conditions().get("ScalingActive") == ("True", "ValidMetricFound"), lambda: yaml.safe_dump(status()))
    assert status()["desiredReplicas"] == 1, "at its target it stays"
    assert all("/pods/*/held_requests" in each or "/pods/%2A/held_requests" in each for each in metrics.asked), metrics.asked[:3]
    # 10 at the one: 3 are wanted, and as many may come in 15 s. Then 10 at each of three: 8, the most there may be.
    metrics.value = 10
    began = time.monotonic()
    empty.settles(router, 3)
    until(lambda: status()["desiredReplicas"] == 8, lambda: yaml.safe_dump(status()), 60)
    print(f"8 are wanted after {time.monotonic() - began:.0f} s: {conditions()}")
    empty.settles(router, 8, 120)
    # Nothing is held any more. For five minutes nobody goes.
    metrics.value = 0
    time.sleep(20)
    assert status()["desiredReplicas"] == 8 and conditions()["AbleToScale"][1] == "ScaleDownStabilized", conditions()
