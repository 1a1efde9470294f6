"""etcd, kube-apiserver and kube-controller-manager as processes of their own, and a client for them."""

import base64
import json
import re
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

PATIENCE_SECONDS = 90

API_ADDRESS = "10.64.0.1"
API_PORT = 6443
ETCD = "http://127.0.0.1:2379"
ADMIN_TOKEN = "the-tests-themselves"

CONTROLLERS = (
    "deployment,replicaset,statefulset,job,endpoint,endpointslice,disruption,horizontalpodautoscaling,"
    "serviceaccount,serviceaccount-token,root-ca-cert-publisher,namespace,garbagecollector,pvc-protection"
)


def until(wanted, what, seconds=PATIENCE_SECONDS):
    """Waits until `wanted()` is true and gives back what it was. Says what it waited for, and what there was instead."""
    end = time.monotonic() + seconds
    while True:
        found = wanted()
        if found:
            return found
        assert time.monotonic() < end, f"never within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.05)


class Process:
    """A program whose output goes to a file."""

    def __init__(self, command, log: Path, **more):
        self.command, self.log, self._more = [str(part) for part in command], log, more
        self.start()

    def start(self):
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, **self._more
            )

    def stop(self, seconds=20):
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Binaries:
    etcd: str
    apiserver: str
    controller_manager: str
    servelab: str

    def version(self) -> tuple[int, int]:
        said = subprocess.run([self.apiserver, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"v(\d+)\.(\d+)", said)
        assert found, f"{self.apiserver} --version said {said!r}"
        return int(found[1]), int(found[2])


class Certificates:
    """An authority, a certificate of the API server and of all that stands in for it, and the key of service accounts."""

    def __init__(self, folder: Path):
        self.authority, self.server, self.key = folder / "ca.crt", folder / "server.crt", folder / "server.key"
        self.accounts = folder / "accounts.key"
        extensions = folder / "extensions"
        extensions.write_text(
            "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n"
            f"subjectAltName=IP:{API_ADDRESS},IP:10.64.0.2,IP:10.96.0.1,IP:127.0.0.1,DNS:localhost,"
            "DNS:kubernetes.default.svc,DNS:metrics.servelab.svc\n"
        )
        authority_key, request = folder / "ca.key", folder / "server.csr"
        elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        self._openssl("req", "-x509", *elliptic, "-keyout", authority_key, "-out", self.authority, "-subj", "/CN=the tests' CA")
        self._openssl("req", *elliptic, "-keyout", self.key, "-out", request, "-subj", "/CN=kube-apiserver")
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.authority, "-CAkey", authority_key, "-CAcreateserial",
            "-extfile", extensions, "-out", self.server,
        )
        self._openssl("genrsa", "-out", self.accounts, "2048")

    @staticmethod
    def _openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Refused(Exception):
    """The API server's own words."""

    def __init__(self, code: int, said: dict):
        super().__init__(f"{code}: {said.get('message', said)}")
        self.code, self.said = code, said


# Where the kinds of deploy/ and of the tests are served, and whether in a namespace.
PLURALS = {
    "Endpoints": "endpoints",
    "NetworkPolicy": "networkpolicies",
    "PriorityClass": "priorityclasses",
    "RuntimeClass": "runtimeclasses",
}
CLUSTER_WIDE = {"Namespace", "Node", "PriorityClass", "RuntimeClass", "CustomResourceDefinition", "APIService"}


def path_of(manifest: dict, named=True) -> str:
    """Where the API server has an object."""
    version, kind = manifest["apiVersion"], manifest["kind"]
    path = f"/apis/{version}" if "/" in version else f"/api/{version}"
    if kind not in CLUSTER_WIDE:
        path += f"/namespaces/{manifest['metadata']['namespace']}"
    path += f"/{PLURALS.get(kind, kind.lower() + 's')}"
    return f"{path}/{manifest['metadata']['name']}" if named else path


class Api:
    """A client of the API server with one token."""

    def __init__(self, authority: Path, token: str, address: str = f"{API_ADDRESS}:{API_PORT}"):
        self._base, self._token = f"https://{address}", token
        self._tls = ssl.create_default_context(cafile=str(authority))

    def ask(self, method: str, path: str, body=None, content="application/json", **query):
        """The answer as data. The server's warnings are in `warnings` of this client."""
        if query:
            path += "?" + urllib.parse.urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self._token}", "content-type": content}
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
                self.warnings = answer.headers.get_all("warning") or []
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
            try:
                said = json.loads(text)
            except ValueError:
                said = {"message": text.decode(errors="replace")}
            raise Refused(error.code, said) from None
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def get(self, path: str, **query):
        return self.ask("GET", path, **query)

    def create(self, manifest: dict):
        return self.ask("POST", path_of(manifest, named=False), manifest)

    def apply(self, manifest: dict, **query):
        """As `kubectl apply --server-side`, which refuses fields that the server does not know."""
        return self.ask(
            "PATCH", path_of(manifest), manifest, "application/apply-patch+yaml",
            fieldManager="tests", force="true", **query,
        )

    def merge(self, path: str, body: dict):
        return self.ask("PATCH", path, body, "application/merge-patch+json")

    def delete(self, path: str, **options):
        try:
            return self.ask("DELETE", path, options or None)
        except Refused as refused:
            if refused.code != 404:
                raise
            return None

    def gone(self, path: str) -> bool:
        try:
            self.get(path)
            return False
        except Refused as refused:
            if refused.code != 404:
                raise
            return True

    def serves(self, version: str) -> bool:
        """Whether it has that group in that version, as discovery.k8s.io/v1."""
        return not self.gone(f"/apis/{version}")


class ControlPlane:
    """All three, each of which may be stopped and started again."""

    def __init__(self, binaries: Binaries, folder: Path):
        self.folder, self.binaries = folder, binaries
        self._processes: list[Process] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self):
        folder, binaries = self.folder, self.binaries
        self.certificates = Certificates(folder)
        self.api = Api(self.certificates.authority, ADMIN_TOKEN)
        (folder / "tokens.csv").write_text(f"{ADMIN_TOKEN},tests,tests,system:masters\n")
        self._kubeconfig()
        # In 1.20 and 1.21 the conditions of a pod that ends are behind a gate; later versions have no such gate.
        gates = ["--feature-gates=EndpointSliceTerminatingCondition=true"] if binaries.version() < (1, 22) else []
        self.etcd = self._run(
            [binaries.etcd, "--data-dir", folder / "etcd", "--listen-client-urls", ETCD, "--advertise-client-urls", ETCD,
             "--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync"],
            folder / "etcd.log",
        )
        self.apiserver = self._run([binaries.apiserver, *self._apiserver_flags(), *gates], folder / "apiserver.log")
        self.wait()
        self.controllers = self._run(
            [binaries.controller_manager, f"--kubeconfig={folder / 'kubeconfig'}", f"--controllers={CONTROLLERS}",
             f"--service-account-private-key-file={self.certificates.accounts}",
             f"--root-ca-file={self.certificates.authority}", "--leader-elect=false", "--bind-address=127.0.0.1",
             "--horizontal-pod-autoscaler-sync-period=1s", *gates],
            folder / "controllers.log",
        )

    def _run(self, command, log: Path) -> Process:
        self._processes.append(Process(command, log))
        return self._processes[-1]

    def _apiserver_flags(self):
        certificates = self.certificates
        return [
            f"--etcd-servers={ETCD}", f"--bind-address={API_ADDRESS}", f"--advertise-address={API_ADDRESS}",
            f"--secure-port={API_PORT}", "--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder / 'tokens.csv'}", "--anonymous-auth=false",
            f"--tls-cert-file={certificates.server}", f"--tls-private-key-file={certificates.key}",
            f"--service-account-key-file={certificates.accounts}",
            f"--service-account-signing-key-file={certificates.accounts}",
            "--service-account-issuer=https://kubernetes.default.svc", "--enable-aggregator-routing=true",
        ]

    def _kubeconfig(self):
        authority = base64.b64encode(self.certificates.authority.read_bytes()).decode()
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": {
                "server": f"https://{API_ADDRESS}:{API_PORT}", "certificate-authority-data": authority}}],
            "users": [{"name": "tests", "user": {"token": ADMIN_TOKEN}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
        }
        (self.folder / "kubeconfig").write_text(json.dumps(config))

    def wait(self):
        """Until the API server has all that it needs to answer."""

        def ready():
            assert self.apiserver.process.poll() is None, self.apiserver.text()[-3000:]
            try:
                return self.api.get("/readyz") == "ok"
            except (OSError, Refused):
                return False

        until(ready, lambda: self.apiserver.text()[-3000:])

    def restart(self):
        self.apiserver.stop()
        self.apiserver.start()
        self.wait()

    def compact(self):
        """etcd forgets what happened before now."""

        def etcd(path, body):
            request = urllib.request.Request(f"{ETCD}/v3/{path}", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)

        revision = etcd("kv/range", {"key": base64.b64encode(b"/").decode()})["header"]["revision"]
        etcd("kv/compaction", {"revision": revision, "physical": True})

    def account_token(self, namespace: str, account: str, pod: dict | None = None) -> str:
        """As the kubelet asks for it."""
        spec = {"audiences": ["https://kubernetes.default.svc"], "expirationSeconds": 3600}
        if pod:
            meta = pod["metadata"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return self.api.ask("POST", path, asked)["status"]["token"]

    def stop(self):
        for process in reversed(self._processes):
            process.stop()
