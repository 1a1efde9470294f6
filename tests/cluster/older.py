"""What an API server of an older version has under another name, and what it does not have at all.

The manifests are for Kubernetes 1.30 and later. Against an older server they are changed just so far that it takes them,
and each change is said, so that nothing is left out without a word."""

import copy
from typing import Callable

# What was served under which version before it was stable. The fields that deploy/ uses are the same in both.
BEFORE = {
    "autoscaling/v2": "autoscaling/v2beta2",
    "policy/v1": "policy/v1beta1",
    "discovery.k8s.io/v1": "discovery.k8s.io/v1beta1",
}


def converted(manifest: dict, version: tuple[int, int], serves: Callable[[str], bool]) -> tuple[dict, list[str]]:
    """The manifest as that server takes it, and what was changed."""
    manifest, notes = copy.deepcopy(manifest), []
    api = manifest["apiVersion"]
    if api in BEFORE and not serves(api):
        manifest["apiVersion"] = BEFORE[api]
        notes.append(f"{api} is {BEFORE[api]}")
    if manifest["kind"] == "PodDisruptionBudget" and version < (1, 27):
        if manifest["spec"].pop("unhealthyPodEvictionPolicy", None):
            notes.append("no unhealthyPodEvictionPolicy")
    if manifest["kind"] == "Service" and version < (1, 21):
        for port in manifest["spec"]["ports"]:
            port.setdefault("protocol", "TCP")
        notes.append("server-side apply wants each port's protocol")
    for spec in pod_specs(manifest):
        for container in spec["containers"]:
            hook = container.get("lifecycle", {}).get("preStop", {})
            if "sleep" in hook and version < (1, 29):
                container["lifecycle"]["preStop"] = {"exec": {"command": ["sleep", str(hook["sleep"]["seconds"])]}}
                notes.append("preStop.sleep is a command")
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "grpc" in container.get(probe, {}) and version < (1, 23):
                    asked = container[probe].pop("grpc")
                    container[probe]["tcpSocket"] = {"port": asked["port"]}
                    notes.append(f"{probe} of gRPC is one of TCP")
    return manifest, [f"{manifest['kind']} {manifest['metadata']['name']}: {note}" for note in notes]


def pod_specs(manifest: dict):
    template = manifest.get("spec", {}).get("template")
    if manifest["kind"] in ("Deployment", "StatefulSet", "Job") and template:
        yield template["spec"]


def newer_slice(slice: dict) -> dict:
    """An EndpointSlice of v1beta1, or a list of them, as v1 has it."""
    if "items" in slice:
        slice["items"] = [newer_slice(each) for each in slice["items"]]
    if slice.get("apiVersion") == "discovery.k8s.io/v1beta1":
        slice["apiVersion"] = "discovery.k8s.io/v1"
    for endpoint in slice.get("endpoints") or []:
        topology = endpoint.pop("topology", {})
        node, zone = topology.pop("kubernetes.io/hostname", None), topology.pop("topology.kubernetes.io/zone", None)
        if node:
            endpoint.setdefault("nodeName", node)
        if zone:
            endpoint["zone"] = zone
        if topology:
            endpoint["deprecatedTopology"] = topology
    return slice
