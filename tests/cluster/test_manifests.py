"""Every overlay, applied as its first lines say, to a real API server; its pods made by real controllers."""

import subprocess

import pytest
import yaml

from control_plane import Refused, path_of, until
from fleet import NAMESPACE
from manifests import KEDA_FILES, OVERLAYS, of_kind, read, render
from older import BEFORE

# What a cluster with NVIDIA's GPU operator has.
RUNTIME_CLASS = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"}


def kubectl(cluster, objects: list[dict]) -> list[str]:
    """`kubectl apply`; one line for each object."""
    folder = cluster.plane.folder
    # kubectl asks newer servers themselves whether they know all fields. An older one was asked before, see below.
    check = "strict" if cluster.version >= (1, 27) else "false"
    command = ["kubectl", "--kubeconfig", folder / "kubeconfig", "--cache-dir", folder / "cache"]
    command += ["apply", f"--validate={check}", "-f", "-"]
    run = subprocess.run(command, input=yaml.safe_dump_all(objects), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if not is_of_the_conversion(line)]
    assert not said, said
    return run.stdout.splitlines()


def is_of_the_conversion(warning: str) -> bool:
    """An older server warns of what it was given in place of what the manifest says."""
    return any(f"{version} " in warning and "deprecated" in warning for version in BEFORE.values())


def differences(given, live, place="") -> list[str]:
    """Where the server has something else than the manifest says. An empty list is not kept, and means the same."""
    if isinstance(given, dict) and isinstance(live, dict):
        return [found for key, value in given.items() if value != [] or live.get(key)
                for found in differences(value, live.get(key), f"{place}.{key}")]
    if isinstance(given, list) and isinstance(live, list) and len(given) == len(live):
        return [found for number, pair in enumerate(zip(given, live)) for found in differences(*pair, f"{place}[{number}]")]
    return [] if given == live else [f"{place}: {given!r} became {live!r}"]


def convert(cluster, overlay: str) -> list[dict]:
    objects = []
    for manifest in render(overlay):
        changed, notes = cluster.convert(manifest)
        objects.append(changed)
        for note in notes:
            print(f"changed for this server: {note}")
    return objects


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_taken_as_it_is(empty, overlay):
    objects = convert(empty, overlay)
    kubectl(empty, objects)
    warnings = []
    for each in objects:
        live = empty.api.get(path_of(each))
        assert not differences(each, live), each["metadata"]["name"]
        # Server-side apply refuses fields that are not in the server's own schema; as it would be taken, it is the same.
        tried = empty.api.apply(each, dryRun="All")
        warnings += [each for each in empty.api.warnings if not is_of_the_conversion(each)]
        assert not differences(each, tried), each["metadata"]["name"]
    assert not warnings, warnings
    changed = [line for line in kubectl(empty, objects) if not line.endswith(" unchanged")]
    assert not changed, "applied again, it is the same"


def test_the_other_scaled_objects_are_taken_as_they_are(empty):
    """Those of deploy/keda, by their definitions, which leave out what they do not name."""
    empty.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    # One after the other: they are alternatives of one name.
    for each in [each for path in KEDA_FILES for each in read(path)]:
        each["metadata"]["namespace"] = NAMESPACE
        kubectl(empty, [each])
        # A Secret's plain text is not given back.
        each.pop("stringData", None)
        assert not differences(each, empty.api.get(path_of(each))), each["metadata"]["name"]


@pytest.mark.parametrize(
    ("first", "then"), [("local", "sim"), ("local", "local-canary"), ("gpu", "gpu-mig"), ("gpu", "gpu-gateway")]
)
def test_an_overlay_may_follow_another(empty, first, then):
    """No field that cannot be changed is changed; the job that was there stays."""
    kubectl(empty, convert(empty, first))
    kubectl(empty, convert(empty, then))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_controllers_make_the_pods(empty, overlay):
    if overlay.startswith("gpu"):
        empty.api.create(RUNTIME_CLASS)
    objects = convert(empty, overlay)
    kubectl(empty, objects)
    wanted = {each["metadata"]["name"]: each["spec"].get("replicas", 1) for each in of_kind(objects, "Deployment")}
    wanted |= {each["metadata"]["name"]: 1 for each in of_kind(objects, "Job")}

    def made():
        pods = empty.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]
        names = [pod["metadata"]["labels"]["app.kubernetes.io/name"] for pod in pods]
        return {name: names.count(name) for name in wanted}

    until(lambda: made() == wanted, lambda: f"{made()} and not {wanted}: {events(empty)}", 60)
    if overlay.startswith("gpu"):
        pods = empty.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods", labelSelector="app.kubernetes.io/name=servelab")
        (replica,) = pods["items"]
        assert replica["spec"]["priority"] == 100000


def events(cluster) -> list[str]:
    found = cluster.api.get(f"/api/v1/namespaces/{NAMESPACE}/events")["items"]
    return [each["message"] for each in found if each["type"] == "Warning"]


def test_without_the_runtime_class_no_replica_is_made(empty):
    """What the overlay's first lines warn of: the API server refuses every pod."""
    kubectl(empty, convert(empty, "gpu"))
    said = until(lambda: [each for each in events(empty) if "nvidia" in each], "no word of it", 60)
    assert 'RuntimeClass "nvidia" not found' in said[0]


def test_every_selector_selects(empty):
    """Services, budgets and the scaler's target, as the controllers see them."""
    empty.start(replicas=2)
    for service, app, count in (("servelab-replicas", "servelab", 2), ("servelab", "servelab-router", 1)):
        until(lambda: len(empty.endpoints(service)) == count, lambda: f"{empty.slices(service)}")
        assert {each.split(":")[0] for each in empty.endpoints(service)} == {pod.ip for pod in empty.ready_pods(app)}
    for name, count in (("servelab", 2), ("servelab-router", 1)):
        status = until(lambda: budget(empty, name, count), lambda: empty.api.get(policy(empty, name)))
        assert status["disruptionsAllowed"] == 1, "a node can be drained"


def policy(cluster, name: str) -> str:
    version = "policy/v1" if cluster.version >= (1, 21) else "policy/v1beta1"
    return cluster.path("PodDisruptionBudget", name, version)


def budget(cluster, name: str, healthy: int) -> dict | None:
    status = cluster.api.get(policy(cluster, name)).get("status", {})
    return status if status.get("currentHealthy") == healthy and status.get("expectedPods") == healthy else None


def test_a_drained_node_takes_one_replica_at_a_time(empty):
    router = empty.start(replicas=2)
    version = "policy/v1" if empty.version >= (1, 22) else "policy/v1beta1"

    def evict(pod):
        body = {"apiVersion": version, "kind": "Eviction", "metadata": {"name": pod.name, "namespace": NAMESPACE}}
        try:
            empty.api.ask("POST", f"{pod.path}/eviction", body)
            return 201
        except Refused as refused:
            return refused.code

    until(lambda: budget(empty, "servelab", 2), "no budget")
    first, second = empty.ready_pods()
    assert (evict(first), evict(second)) == (201, 429)
    empty.settles(router, 2)
    # And the last one may go too: a fleet of one does not block the drain for ever.
    empty.scale(1)
    empty.settles(router, 1)
    until(lambda: budget(empty, "servelab", 1), "no budget")
    assert evict(empty.ready_pods()[0]) == 201
    empty.settles(router, 1)
