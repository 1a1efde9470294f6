"""What the schemas cannot see: manifests that apply without an error and fail when it matters."""

import json
import re
from urllib.parse import urlparse

import pytest
import yaml

from manifests import (
    DEPLOY,
    KEDA_FILES,
    KUSTOMIZE,
    OVERLAYS,
    REPOSITORY,
    ROUTER,
    of_kind,
    only,
    pod,
    read,
    render,
    router_settings,
    settings,
)

# The server cuts what is left after the drain, and gives it and the engine two seconds each.
AFTER_DRAIN_SECONDS = 4


@pytest.fixture(params=OVERLAYS)
def objects(request):
    return render(request.param)


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def replica(objects: list[dict]) -> dict:
    return pod(only(objects, "Deployment"))["containers"][0]


def router(objects: list[dict]) -> dict:
    return pod(only(objects, "Deployment", ROUTER))["containers"][0]


def scaled_objects() -> list[tuple[str, dict]]:
    working = [path for path in KEDA_FILES if path.parent.name != "broken"]
    files = [(path.name, each) for path in working for each in of_kind(read(path), "ScaledObject")]
    return files + [(overlay, each) for overlay in OVERLAYS for each in of_kind(render(overlay), "ScaledObject")]


def assert_it_drains_in_time(deployment: dict, drain: str):
    spec = pod(deployment)
    pause = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + seconds(drain) + AFTER_DRAIN_SECONDS
    assert pause > 0, "endpoints are withdrawn while SIGTERM is sent"


def test_answers_can_end_before_the_pod_is_killed(objects):
    drains = {"servelab": settings(objects)["drain-timeout"], ROUTER: router_settings(objects)["drain-timeout"]}
    for name, drain in drains.items():
        assert_it_drains_in_time(only(objects, "Deployment", name), drain)
    assert seconds(drains[ROUTER]) >= seconds(drains["servelab"]), "an answer passes through the router to its end"


def test_probes_ask_the_right_endpoints(objects):
    container = replica(objects)
    path = {probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert path == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/live"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120, "a load takes that long"
    path = {probe: router(objects)[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")}
    assert path == {"readinessProbe": "/ready", "livenessProbe": "/live"}


def test_ports_agree(objects):
    for name, typed in (("servelab", settings(objects)), (ROUTER, router_settings(objects))):
        template = only(objects, "Deployment", name)["spec"]["template"]
        ports = template["spec"]["containers"][0]["ports"]
        assert [(port["name"], port["containerPort"]) for port in ports] == [("http", typed["port"])]
        annotations = template["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert annotations["prometheus.io/port"] == str(typed["port"])
        assert typed["host"] == "0.0.0.0", "127.0.0.1 is the pod alone"
    for service in of_kind(objects, "Service"):
        owners = [each for each in of_kind(objects, "Deployment") if
                  service["spec"]["selector"].items() <= each["spec"]["template"]["metadata"]["labels"].items()]
        named = {port["name"] for owner in owners for container in pod(owner)["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def test_clients_meet_the_router_and_the_router_the_replicas(objects):
    """What must be true for one request to arrive: services, names, ports, rights and network policies."""
    entrance = only(objects, "Service")["spec"]["selector"]
    assert entrance == {"app.kubernetes.io/name": ROUTER}
    (found_by,) = router_settings(objects)["replicas-kubernetes"]
    name, port_name = found_by.split(":")
    service = only(objects, "Service", name)["spec"]
    assert service["selector"] == {"app.kubernetes.io/name": "servelab"}
    (named,) = [port for port in service["ports"] if port["name"] == port_name]
    port = settings(objects)["port"]
    assert named["targetPort"] == "http" and named["port"] == port, "a headless name leads to the pods' own port"
    policy = only(objects, "NetworkPolicy", ROUTER)["spec"]
    to_replicas = [rule for rule in policy["egress"] if "podSelector" in rule.get("to", [{}])[0]]
    assert [(rule["to"][0]["podSelector"]["matchLabels"], rule["ports"]) for rule in to_replicas] == [
        (service["selector"], [{"port": port, "protocol": "TCP"}])
    ]
    api = [rule for rule in policy["egress"] if {"port": 443, "protocol": "TCP"} in rule["ports"]]
    assert api and "to" not in api[0], "the API server tells which replicas there are"


def test_the_router_may_follow_endpoints_and_nothing_else(objects):
    spec = pod(only(objects, "Deployment", ROUTER))
    account = spec["serviceAccountName"]
    assert spec.get("automountServiceAccountToken", True), "it asks the API server"
    assert not pod(only(objects, "Deployment")).get("automountServiceAccountToken", True), "a replica never does"
    bound = [
        each["roleRef"]["name"]
        for each in of_kind(objects, "RoleBinding")
        if account in [subject["name"] for subject in each["subjects"]]
    ]
    rules = [rule for name in bound for rule in only(objects, "Role", name)["rules"]]
    assert rules == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]


def test_a_request_is_held_for_longer_than_a_cold_start_takes_on_this_fleet(objects):
    hold = seconds(router_settings(objects)["hold-timeout"])
    polling = max(each["spec"].get("pollingInterval", 30) for each in of_kind(objects, "ScaledObject"))
    assert hold >= polling + 60, "the scaler notices, then a replica starts"


def test_selectors_select(objects):
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in of_kind(objects, "Deployment")
    }
    selectors = [each["spec"]["selector"] for each in of_kind(objects, "Service")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(objects, "PodDisruptionBudget")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(objects, "PodMonitor")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(objects, "NetworkPolicy")]
    assert len(selectors) >= 4
    for selector in selectors:
        chosen = [name for name, pod_labels in labels.items() if selector.items() <= pod_labels.items()]
        assert len(chosen) == 1, selector


def test_the_scaler_owns_the_number_of_replicas(objects):
    """With `replicas` in the Deployment every apply sets the number back, in the middle of a spike too."""
    targets = [each["spec"]["scaleTargetRef"]["name"] for each in of_kind(objects, "ScaledObject")]
    targets += [each["spec"]["scaleTargetRef"]["name"] for each in of_kind(objects, "HorizontalPodAutoscaler")]
    assert targets == ["servelab"], "one scaler for one target"
    for owner in [only(objects, "Deployment"), *of_kind(objects, "Rollout")]:
        assert "replicas" not in owner["spec"]
    for rollout in of_kind(objects, "Rollout"):
        # Without it the pods of both count; with 0 replicas in the manifest a Deployment that serves is emptied first.
        assert rollout["spec"]["workloadRef"]["scaleDown"] == "onsuccess"


def test_what_is_applied_again_is_unchanged(objects):
    """`kubectl apply` compares with what the server made of it: of these it would send a patch every time."""
    for each in of_kind(objects, "Deployment"):
        assert each["spec"].get("strategy", {"type": ""}).get("type") is not None, "it would be taken away and set again"
    for each in of_kind(objects, "NetworkPolicy"):
        rules = [*each["spec"].get("ingress", []), *each["spec"].get("egress", [])]
        assert all("protocol" in port for rule in rules for port in rule.get("ports", [])), "lists are compared as a whole"
        assert [] not in each["spec"].values(), "the server keeps no empty list"
    for each in objects:
        assert len(json.dumps(each)) < 256 << 10, "it is kept in an annotation, which has an end"


def test_a_budget_does_not_block_the_drain_of_a_node(objects):
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert budget["spec"].get("maxUnavailable") and "minAvailable" not in budget["spec"]


def test_pods_meet_the_restricted_standard(objects):
    namespace = only(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    specs = [pod(each) for each in of_kind(objects, "Deployment") + of_kind(objects, "Job")]
    assert specs
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]


def test_everything_is_in_the_namespace(objects):
    cluster_wide = {"Namespace", "PriorityClass"}
    for each in objects:
        expected = None if each["kind"] in cluster_wide else "servelab"
        assert each["metadata"].get("namespace") == expected, each["kind"]
    for binding in of_kind(objects, "RoleBinding"):
        assert all(subject["namespace"] == "servelab" for subject in binding["subjects"])


def test_what_is_mounted_is_there(objects):
    names = {kind: {each["metadata"]["name"] for each in of_kind(objects, kind)} for kind in
             ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount", "PriorityClass")}
    for spec in [pod(each) for each in of_kind(objects, "Deployment") + of_kind(objects, "Job")]:
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
        mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == volumes.keys()
        assert spec.get("serviceAccountName", "default") in names["ServiceAccount"] | {"default"}
        assert spec.get("priorityClassName") in names["PriorityClass"] | {None}


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("gpu")])
def test_a_gpu_is_asked_for_once_and_whole(overlay):
    objects = render(overlay)
    resources = replica(objects)["resources"]
    asked = {name: count for name, count in resources["requests"].items() if name.startswith("nvidia.com/")}
    given = {name: count for name, count in resources["limits"].items() if name.startswith("nvidia.com/")}
    assert asked == given and list(asked.values()) == ["1"]
    assert ("mig" in next(iter(asked))) == overlay.endswith("-mig")
    spec = pod(only(objects, "Deployment"))
    assert any(toleration["key"] == "nvidia.com/gpu" for toleration in spec["tolerations"])
    assert spec["runtimeClassName"] == "nvidia" and spec["nodeSelector"]
    # A surge needs a GPU that is not there.
    assert only(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    shared = next(volume for volume in spec["volumes"] if volume["name"] == "shared-memory")
    assert shared["emptyDir"]["medium"] == "Memory" and shared["emptyDir"]["sizeLimit"]


@pytest.mark.parametrize(("place", "scaled"), scaled_objects(), ids=lambda value: value if isinstance(value, str) else "")
def test_scaled_objects_avoid_the_traps(place, scaled):
    spec = scaled["spec"]
    assert 0 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
    if spec["minReplicaCount"] == 0:
        waking = [each["metadata"] for each in spec["triggers"] if "servelab_router_requests_" in each["metadata"]["query"]]
        assert waking, "no trigger lives on at zero: a replica's own series are gone with it"
        assert all(metadata["activationThreshold"] == "0" for metadata in waking), "one request must wake it"
        assert spec["cooldownPeriod"] >= 60, "the next request would find nothing again"
    assert spec["fallback"]["replicas"] >= 2, "without data the fleet must not shrink to the minimum"
    uses_formula = "scalingModifiers" in spec.get("advanced", {})
    for trigger in spec["triggers"]:
        metadata = trigger["metadata"]
        assert trigger.get("metricType", "AverageValue") == "AverageValue"
        assert metadata["ignoreNullValues"] == "false", "no data would be taken for 0"
        assert "metricName" not in metadata, "gone since 2.12, and ignored without a word"
        host = urlparse(metadata["serverAddress"]).hostname
        assert host.endswith(".svc"), f"{host}: KEDA asks from its own namespace"
        assert float(metadata["threshold"]) > 0
        if metadata["serverAddress"].startswith("https:"):
            assert "authModes" in metadata, "the authority would be ignored"
        name = trigger.get("name", "")
        assert isinstance(name, str) and yaml.safe_load(name or "x") not in (True, False), "a boolean in YAML"
        assert not uses_formula or re.search(rf"\b{name}\b", spec["advanced"]["scalingModifiers"]["formula"])


def test_an_overlay_changes_the_model_in_the_query_and_no_more():
    def query(overlay):
        return only(render(overlay), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]

    for overlay, model in (("gpu", "lab"), ("gpu-mig", "lab"), ("sim", "llama-3.1-70b")):
        assert query(overlay) == query("local").replace('"demo"', f'"{model}"')
        typed = settings(render(overlay))
        assert typed.get("served-model-name", [typed["model"]]) == [model]


def test_the_endpoint_picker_reads_what_the_replicas_export():
    objects = render("gpu-gateway")
    assert settings(objects)["metrics-prefix"] == "vllm:", "the picker knows vLLM's names"
    pool = only(objects, "InferencePool")["spec"]
    assert pool["selector"]["matchLabels"].items() <= only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert [port["number"] for port in pool["targetPorts"]] == [settings(objects)["port"]]
    picker = pool["endpointPickerRef"]
    (port,) = only(objects, "Service", picker["name"])["spec"]["ports"]
    assert port["port"] == picker["port"]["number"] and port["appProtocol"] == "http2", "it speaks gRPC"
    arguments = pod(only(objects, "Deployment", picker["name"]))["containers"][0]["args"]
    assert f"--pool-name={only(objects, 'InferencePool')['metadata']['name']}" in arguments
    scaled = only(objects, "ScaledObject")["spec"]
    assert scaled["minReplicaCount"] == 1, "the picker holds nothing while nobody is there"
    assert "vllm:num_requests_waiting" in scaled["triggers"][0]["metadata"]["query"]
    route = only(objects, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]
    assert (route["kind"], route["name"]) == ("InferencePool", "servelab")
    config = next(each for each in of_kind(objects, "ConfigMap") if "picker.yaml" in each["data"])
    profile = yaml.safe_load(config["data"]["picker.yaml"])
    declared = {plugin["type"] for plugin in profile["plugins"]}
    assert {each["pluginRef"] for each in profile["schedulingProfiles"][0]["plugins"]} == declared


def test_a_canary_is_judged_and_scaled():
    objects = render("local-canary")
    rollout = only(objects, "Rollout")
    target = only(objects, "ScaledObject")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Rollout", rollout["metadata"]["name"])
    reference = rollout["spec"]["workloadRef"]
    assert only(objects, reference["kind"], reference["name"])
    analysis = rollout["spec"]["strategy"]["canary"]["analysis"]
    template = only(objects, "AnalysisTemplate", analysis["templates"][0]["templateName"])["spec"]
    given = {argument["name"] for argument in analysis["args"]}
    assert given == {argument["name"] for argument in template["args"]}
    for metric in template["metrics"]:
        query = metric["provider"]["prometheus"]["query"]
        used = set(re.findall(r"\{\{args\.(\w+)\}\}", query))
        assert "canary" in used and used <= given
        assert metric["successCondition"].startswith("len(result) == 0 || "), "no traffic is not a fault"


def test_broken_ones_say_so():
    broken = [path for path in KEDA_FILES if path.parent.name == "broken"]
    assert len(broken) >= 3
    for path in broken:
        assert path.read_text().startswith("# BROKEN: "), path.name
        for scaled in read(path):
            assert scaled["metadata"]["annotations"]["servelab.dev/broken"]
            assert scaled["metadata"]["name"] == path.stem, "not the name of one that works"


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    found, name = {}, None
    for line in text.splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            found[name] = []
        if name and line and not line.startswith("#"):
            found[name].append(line)
    return found


def test_images_have_a_stage_that_runs_without_rights():
    built = stages()
    images = {replica(render(overlay))["image"] for overlay in OVERLAYS}
    assert images == {"servelab:cpu", "servelab:cuda"}
    for tag in (image.split(":")[1] for image in images):
        lines = built[tag]
        user = [line.split()[1] for line in lines if line.startswith("USER ")]
        assert user == ["65532:65532"], "a number, or runAsNonRoot cannot be checked"
        assert "devel" not in lines[0] and any(line.startswith("ENTRYPOINT [") for line in lines)
    assert list(built)[-1] == "cpu", "what is built without --target"


def test_compose_mounts_what_is_there_and_waits_for_the_drain():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    replicas = [service for name, service in compose["services"].items() if name.startswith("replica-")]
    assert len(replicas) == 2
    for service in replicas:
        command = service["command"]
        drain = seconds(command[command.index("--drain-timeout") + 1])
        assert seconds(service["stop_grace_period"]) > drain + AFTER_DRAIN_SECONDS
        assert service["image"] == "servelab:cpu"
    router = compose["services"]["router"]
    named = [flag.removeprefix("--replica=") for flag in router["command"] if flag.startswith("--replica=")]
    assert named == [f"http://{name}:8000" for name in compose["services"] if name.startswith("replica-")]
    (drain,) = [flag.removeprefix("--drain-timeout=") for flag in router["command"] if flag.startswith("--drain-timeout=")]
    assert seconds(router["stop_grace_period"]) > seconds(drain) + AFTER_DRAIN_SECONDS
    for name, service in compose["services"].items():
        assert service.get("read_only") or name == "dcgm-exporter"
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
            assert there, source
    build = replicas[0]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists() and build["target"] in stages()


def test_prometheus_scrapes_what_compose_runs():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    jobs = {job["job_name"]: job for job in yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())["scrape_configs"]}
    targets = [each.split(":")[0] for job in jobs.values() for group in job.get("static_configs", []) for each in group["targets"]]
    assert sorted(targets) == sorted(name for name, each in compose.items() if each["image"] == "servelab:cpu" and name != "load")
    (discovered,) = jobs["dcgm"]["dns_sd_configs"]
    assert all(name in compose for name in discovered["names"])
    assert compose["replica-1"]["environment"] == compose["router"]["environment"] == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://traces:4317"
    }


def test_the_same_provisioning_in_compose_and_cluster():
    for name in ("datasources.yaml", "dashboards.yaml"):
        assert read(DEPLOY / "grafana" / name) == read(KUSTOMIZE / "components/monitoring" / name)


def test_every_dashboard_and_rule_reaches_the_cluster():
    listed = yaml.safe_load((REPOSITORY / "dashboards/kustomization.yaml").read_text())["configMapGenerator"]
    files = {file for generator in listed for file in generator["files"]}
    dashboards = REPOSITORY / "dashboards"
    assert files == {str(p.relative_to(dashboards)) for p in [*dashboards.glob("*.json"), *dashboards.glob("rules/*.yaml")]}
