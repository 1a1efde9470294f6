"""The router as a pod, with its own service account, on EndpointSlices that real controllers write."""

import time

import pytest

from control_plane import Api, Refused, until
from fleet import NAMESPACE, Load, Router

REVIEWS = "authorization.k8s.io"


def test_replicas_come_when_they_are_ready_and_leave_when_they_are_not(empty):
    router = empty.start(replicas=2)
    assert len(router.replicas()) == 2
    with Load(router) as load:
        load.goes_on()
        empty.scale(4)
        empty.settles(router, 4)
        load.goes_on()
        unready = empty.ready_pods()[0]
        unready.unready = True
        empty.settles(router, 3)
        assert f"{unready.ip}:8000" not in router.replicas()
        load.goes_on()
        unready.unready = False
        empty.settles(router, 4)
        load.goes_on()
        empty.scale(1)
        empty.settles(router, 1)
        load.goes_on()
    until(lambda: len(empty.kubelet.named("servelab")) == 1, "pods stay")
    assert not empty.kubelet.killed


def test_a_pod_that_ends_leaves_the_router_while_it_still_serves(empty):
    router = empty.start(replicas=2)
    with Load(router) as load:
        load.goes_on()
        ending = empty.ready_pods()[0]
        address = f"{ending.ip}:8000"
        began = time.monotonic()
        empty.api.delete(ending.path)
        until(lambda: address not in router.replicas(), "it stays", 5)
        took = time.monotonic() - began
        assert ending.process.poll() is None, "it is in its preStop pause"
        empty.settles(router, 2)
        load.goes_on()
    print(f"left the router {took:.2f} s after it was deleted")
    until(lambda: ending.process.poll() is not None, "it does not end")
    assert not empty.kubelet.killed


def test_a_rollout_under_load_loses_nothing(empty):
    router = empty.start(replicas=3)
    before = {pod.name for pod in empty.ready_pods()}
    with Load(router) as load:
        load.goes_on()
        template = {"metadata": {"annotations": {"tests/rolled": "1"}}}
        empty.api.merge(empty.path("Deployment"), {"spec": {"template": template}})
        until(lambda: len(empty.ready_pods()) == 3 and before.isdisjoint(pod.name for pod in empty.ready_pods()), "old pods stay")
        empty.settles(router, 3)
        load.goes_on()
    assert not empty.kubelet.killed


def test_what_is_applied_again_leaves_the_number_of_replicas(empty):
    router = empty.start(replicas=3)
    empty.apply("local")
    time.sleep(3)
    empty.settles(router, 3)


def test_to_zero_and_back_requests_are_held(empty):
    router = empty.start(replicas=1)
    empty.scale(0)
    until(lambda: not empty.endpoints() and not router.replicas(), lambda: router.replicas())
    with Load(router, clients=2) as load:
        time.sleep(2)
        assert load.answered == 0 and not load.failed
        empty.scale(1)
        empty.settles(router, 1)
        load.goes_on()
    assert not router.said("no such port"), "a service without pods is no fault"


def test_watches_end_and_go_on_without_a_new_list(empty):
    empty.proxy.watch_seconds = 3
    router = empty.start(replicas=1)
    lists = empty.proxy.lists()
    until(lambda: len(empty.proxy.watches()) >= 4, lambda: empty.proxy.passed)
    empty.scale(2)
    empty.settles(router, 2)
    until(lambda: any("BOOKMARK" in each.events for each in empty.proxy.watches()), lambda: empty.proxy.watches())
    assert empty.proxy.lists() == lists, "it goes on from the version that it has"
    assert not router.said("cannot be followed")


def test_an_api_server_that_restarts_changes_nothing(empty):
    router = empty.start(replicas=2)
    with Load(router) as load:
        load.goes_on()
        empty.plane.apiserver.stop()
        time.sleep(6)
        assert len(router.replicas()) == 2
        load.goes_on()
        empty.plane.apiserver.start()
        empty.plane.wait()
        empty.scale(3)
        empty.settles(router, 3)
        load.goes_on()
    assert router.said("cannot be followed; the replicas stay") and router.said("the API server answers again")


def test_versions_that_are_gone_are_listed_anew(empty):
    router = empty.start(replicas=2)
    lists = empty.proxy.lists()
    with Load(router) as load:
        empty.proxy.stop()
        load.goes_on()
        gone = empty.ready_pods()[0]
        empty.api.delete(gone.path)
        empty.scale(3)
        until(lambda: len(empty.endpoints()) == 3, lambda: empty.slices())
        until(lambda: gone.process.poll() is not None, "it does not end")
        # Neither etcd nor the API server remembers what happened before.
        empty.plane.compact()
        empty.plane.restart()
        empty.proxy.start()
        empty.settles(router, 3)
        load.goes_on()
    errors = [event for each in empty.proxy.watches() for event in each.events if event.startswith("ERROR")]
    print(f"errors of watches: {errors}, lists: {empty.proxy.lists() - lists}")
    assert errors == ["ERROR 410"] and empty.proxy.lists() > lists


def test_a_connection_that_died_without_a_word_is_noticed(empty):
    router = empty.start(replicas=1)
    until(lambda: empty.proxy.watches(), "no watch")
    empty.proxy.freeze()
    empty.scale(2)
    until(lambda: len(empty.endpoints()) == 2, lambda: empty.slices())
    began = time.monotonic()
    empty.settles(router, 2, seconds=100)
    print(f"noticed after {time.monotonic() - began:.0f} s")


def test_a_token_is_read_anew(empty):
    """The pod's token was bound to a pod that is gone: the API server does not take it any more."""
    router = empty.start(replicas=1)
    pod = router.pod
    doomed = empty.api.create({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "doomed", "namespace": NAMESPACE, "labels": {}},
        "spec": {"serviceAccountName": "servelab-router", "containers": [{"name": "x", "image": "other"}]},
    })
    token = empty.plane.account_token(NAMESPACE, "servelab-router", doomed)
    (pod.folder / "account/token").write_text(token)
    # Until it has read that one, at most a minute.
    time.sleep(61)
    empty.proxy.cut()
    empty.scale(2)
    empty.settles(router, 2)
    empty.api.delete("/api/v1/namespaces/servelab/pods/doomed", gracePeriodSeconds=0)
    until(lambda: is_refused(empty, token), "the token is still good", 30)
    empty.proxy.passed.clear()
    empty.proxy.cut()
    until(lambda: sum(each.status == 401 for each in empty.proxy.passed) >= 2, lambda: empty.proxy.passed)
    until(lambda: router.said("does not take this token"), lambda: router.log()[-1000:])
    with Load(router) as load:
        load.goes_on()
        pod.project_token()
        empty.scale(1)
        empty.settles(router, 1)
        load.goes_on()


def is_refused(cluster, token: str) -> bool:
    try:
        Api(cluster.plane.certificates.authority, token).get(f"/api/v1/namespaces/{NAMESPACE}/pods")
    except Refused as refused:
        return refused.code == 401
    return False


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_each_verb_of_the_role_is_needed_and_said(empty, verb):
    def without(manifest):
        if manifest["kind"] == "Role" and manifest["metadata"]["name"] == "servelab-router":
            manifest["rules"][0]["verbs"].remove(verb)
        return manifest

    empty.apply("local", without)
    empty.scale(1)
    pod = until(lambda: empty.ready_pods("servelab-router"), lambda: empty.why("servelab-router"))[0]
    router = Router(pod)
    until(lambda: len(empty.endpoints()) == 1, lambda: empty.slices())
    until(lambda: refusals(empty, verb) >= 4, lambda: empty.proxy.passed)
    said = [line for line in router.log().splitlines() if "endpointslices" in line]
    assert len(said) == 1 and f"cannot {verb} resource" in said[0], said
    assert "the service account needs list and watch on endpointslices of discovery.k8s.io there" in said[0]
    empty.apply("local")
    empty.settles(router, 1)
    empty.scale(2)
    empty.settles(router, 2)


def refusals(cluster, verb: str) -> int:
    return sum(each.status == 403 and each.watches == (verb == "watch") for each in cluster.proxy.passed)


def test_the_router_may_do_nothing_else(empty):
    empty.apply("local")
    token = empty.plane.account_token(NAMESPACE, "servelab-router")
    router = Api(empty.plane.certificates.authority, token)
    allowed = []
    for group, resource in (("", "pods"), ("", "secrets"), ("", "configmaps"), ("", "services"), ("apps", "deployments"),
                            ("discovery.k8s.io", "endpointslices"), ("keda.sh", "scaledobjects")):
        for verb in ("get", "list", "watch", "create", "update", "patch", "delete"):
            for namespace in (NAMESPACE, "default", ""):
                asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
                review = {"apiVersion": f"{REVIEWS}/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": asked}}
                if router.ask("POST", f"/apis/{REVIEWS}/v1/selfsubjectaccessreviews", review)["status"]["allowed"]:
                    allowed.append((namespace, resource, verb))
    assert allowed == [(NAMESPACE, "endpointslices", verb) for verb in ("list", "watch")]


def test_many_pods_are_in_several_slices(empty):
    router = empty.start(replicas=1)
    for count in (150, 40, 230):
        empty.stubs(count)
        until(lambda: len(empty.endpoints()) == count + 1, lambda: f"{len(empty.endpoints())}", 180)
        empty.follows(router, 30)
        print(f"{count} pods in {len(empty.slices())} slices")
    with Load(router) as load:
        load.goes_on()
        empty.stubs(0)
        empty.settles(router, 1)
        load.goes_on()


def test_more_pods_than_a_router_can_have(empty):
    """What is too much is said, and taken as soon as there is room."""
    router = empty.start(replicas=1)
    empty.stubs(250, "early")
    until(lambda: len(empty.endpoints()) == 251, lambda: f"{len(empty.endpoints())}", 180)
    empty.follows(router, 30)
    empty.stubs(40, "late")
    until(lambda: len(empty.endpoints()) == 291, lambda: f"{len(empty.endpoints())}", 180)
    until(lambda: len(router.replicas()) == 256, lambda: f"{len(router.replicas())}", 30)
    assert router.said("there are 256 replicas already")
    empty.stubs(150, "early")
    until(lambda: len(empty.endpoints()) == 191, lambda: f"{len(empty.endpoints())}", 180)
    empty.follows(router, 30)


def test_a_server_without_the_version_that_is_asked_for_is_named(empty):
    """What somebody sees whose cluster is older than 1.21."""
    if not empty.proxy.translates:
        pytest.skip("this one has discovery.k8s.io/v1")
    empty.proxy.translates = False
    try:
        empty.apply("local")
        pod = until(lambda: empty.ready_pods("servelab-router"), lambda: empty.why("servelab-router"))[0]
        until(lambda: "this API server has no discovery.k8s.io/v1" in pod.log.read_text(), lambda: pod.log.read_text())
    finally:
        empty.proxy.translates = True
