"""Every manifest against the schema of its kind, with unknown fields refused."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

from manifests import KEDA_FILES, KUSTOMIZE, OVERLAYS, read, render

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.37"


def strict(schema):
    """The schema with no other properties than those it names, as `kubectl apply` checks."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    open_ended = result.get("additionalProperties") or result.get("x-kubernetes-preserve-unknown-fields")
    # A property may itself be called `properties`: then it is a schema, and has a type.
    if isinstance(result.get("properties"), dict) and "type" in result and not open_ended:
        result["additionalProperties"] = False
    if result.pop("nullable", False):
        return {"anyOf": [result, {"type": "null"}]}
    return result


def custom_schemas() -> dict[tuple[str, str], dict]:
    schemas = {}
    for path in SCHEMAS.glob("keda.sh_*.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            schema = strict(version["schema"]["openAPIV3Schema"])
            # What the API server knows of every object; a CRD says no more than that it is there.
            schema["properties"]["metadata"] = {"type": "object"}
            schemas[key] = schema
    for path in SCHEMAS.glob("*.io_*.json"):
        schema = strict(json.loads(path.read_text()))
        schema["properties"]["metadata"] = {"type": "object"}
        (version,) = schema["properties"]["apiVersion"]["enum"]
        (kind,) = schema["properties"]["kind"]["enum"]
        schemas[version, kind] = schema
    monitor = prometheus_operator.PodMonitor.model_json_schema(by_alias=True)
    schemas["monitoring.coreos.com/v1", "PodMonitor"] = strict(monitor)
    return schemas


CUSTOM = custom_schemas()


def check(manifest: dict):
    key = (manifest["apiVersion"], manifest["kind"])
    if key in CUSTOM:
        jsonschema.validate(manifest, CUSTOM[key], cls=jsonschema.Draft202012Validator)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_overlays(overlay):
    manifests = render(overlay)
    assert len(manifests) > 5
    for manifest in manifests:
        check(manifest)


@pytest.mark.parametrize("path", KEDA_FILES, ids=lambda path: path.name)
def test_keda_files(path):
    for manifest in read(path):
        check(manifest)


def test_components_that_no_overlay_uses():
    for manifest in read(KUSTOMIZE / "components/hpa/hpa.yaml"):
        check(manifest)


def test_trigger_keys_are_in_kedas_list():
    listed = json.loads((SCHEMAS / "keda-prometheus-trigger.json").read_text())["scalers"][0]["parameters"]
    # Keys that KEDA reads with the authentication, and does not list with the parameters.
    known = {parameter["name"] for parameter in listed} | {"authModes"}
    required = {parameter["name"] for parameter in listed if not parameter.get("optional")} - {"ignoreNullValues"}
    triggers = [
        trigger
        for manifest in [each for path in KEDA_FILES for each in read(path)] + render("local") + render("gpu")
        if manifest["kind"] == "ScaledObject"
        for trigger in manifest["spec"]["triggers"]
    ]
    assert triggers
    for trigger in triggers:
        assert trigger["type"] == "prometheus"
        assert required <= trigger["metadata"].keys() <= known


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "pth")),
        ("Deployment", ("spec", "replica")),
        ("ScaledObject", ("spec", "minReplicas")),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "threshold")),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "prt")),
        ("PodDisruptionBudget", ("spec", "maxUnavailble")),
        ("Rollout", ("spec", "strategy", "canary", "steps", 0, "setWait")),
        ("AnalysisTemplate", ("spec", "metrics", 0, "sucessCondition")),
        ("InferencePool", ("spec", "extensionRef")),
        ("InferencePool", ("spec", "targetPorts", 0, "number ")),
        ("HTTPRoute", ("spec", "rules", 0, "backendRef")),
    ],
)
def test_the_schemas_refuse_what_is_wrong(kind, path):
    """An unknown field, and for the threshold a number where KEDA wants a string."""
    manifest = next(each for overlay in ("gpu", "local-canary", "gpu-gateway") for each in render(overlay) if each["kind"] == kind)
    check(manifest)
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = 5
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check(manifest)
