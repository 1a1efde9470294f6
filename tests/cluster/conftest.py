"""A cluster for all tests: real API server and controllers, a kubelet that is played, and the router as one of its pods."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))
sys.path.insert(0, str(Path(__file__).parent))

from control_plane import Binaries, ControlPlane, until  # noqa: E402
from fleet import Fleet  # noqa: E402
from kubelet import Kubelet  # noqa: E402
from proxy import Proxy  # noqa: E402

PODS = "10.64.0.0/16"


def pytest_addoption(parser):
    parser.addoption("--binary", required=True, help="path of the servelab binary")
    parser.addoption("--etcd", default="etcd", help="path of etcd")
    parser.addoption("--kube-apiserver", required=True, help="path of kube-apiserver")
    parser.addoption("--kube-controller-manager", required=True, help="path of kube-controller-manager")


def own_network():
    """The addresses of the pods, which nobody outside sees."""
    shown = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True).stdout
    names = [link["ifname"] for link in json.loads(shown)]
    if names != ["lo"]:
        pytest.exit("this wants a network of its own: unshare --map-root-user --net --mount COMMAND", 2)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "route", "replace", "local", PODS, "dev", "lo"], check=True)


@pytest.fixture(scope="session")
def binaries(request):
    option = request.config.getoption
    servelab = str(Path(option("--binary")).resolve())
    return Binaries(option("--etcd"), option("--kube-apiserver"), option("--kube-controller-manager"), servelab)


@pytest.fixture(scope="session")
def plane(binaries, tmp_path_factory):
    own_network()
    plane = ControlPlane(binaries, tmp_path_factory.mktemp("plane"))
    yield plane
    plane.stop()


@pytest.fixture(scope="session")
def proxy(plane):
    proxy = Proxy(plane.certificates, translates=not plane.api.serves("discovery.k8s.io/v1"))
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def kubelet(plane, binaries, proxy, tmp_path_factory):
    kubelet = Kubelet(plane, binaries.servelab, tmp_path_factory.mktemp("pods"))
    yield kubelet
    kubelet.stop()


@pytest.fixture(scope="session")
def cluster(plane, kubelet, proxy):
    """With the kinds that others define."""
    fleet = Fleet(plane, kubelet, proxy)
    fleet.define_kinds()
    until(lambda: plane.api.serves("keda.sh/v1alpha1"), "no KEDA")
    return fleet


@pytest.fixture
def empty(cluster):
    """Nothing of an earlier test."""
    cluster.clear()
    yield cluster
    cluster.clear()
