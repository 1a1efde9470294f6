"""The manifests of deploy/: rendered overlays and single files, as plain data."""

import functools
import shutil
import subprocess
import tomllib
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
OVERLAYS = sorted(path.parent.name for path in KUSTOMIZE.glob("overlays/*/kustomization.yaml"))
ROUTER = "servelab-router"
KEDA_FILES = sorted((DEPLOY / "keda").rglob("*.yaml"))


@functools.cache
def _rendered(overlay: str) -> str:
    assert shutil.which("kubectl"), "kubectl is not installed; it renders the overlays"
    folder = KUSTOMIZE / "overlays" / overlay
    run = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, f"{overlay}: {run.stderr}"
    assert not run.stderr, f"{overlay}: {run.stderr}"
    return run.stdout


def render(overlay: str) -> list[dict]:
    """The objects of an overlay, fresh for each caller."""
    return list(yaml.safe_load_all(_rendered(overlay)))


def read(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(objects: list[dict], kind: str) -> list[dict]:
    return [found for found in objects if found["kind"] == kind]


def only(objects: list[dict], kind: str, name: str = "servelab") -> dict:
    found = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} {kind} named {name}"
    return found[0]


def pod(deployment: dict) -> dict:
    return deployment["spec"]["template"]["spec"]


def settings(objects: list[dict], deployment: str = "servelab", file: str = "servelab.toml") -> dict:
    """The settings of a replica or the router, from the ConfigMap that its Deployment mounts."""
    volumes = pod(only(objects, "Deployment", deployment))["volumes"]
    name = next(volume["configMap"]["name"] for volume in volumes if volume["name"] == "config")
    return tomllib.loads(only(objects, "ConfigMap", name)["data"][file])


def router_settings(objects: list[dict]) -> dict:
    return settings(objects, ROUTER, "router.toml")
