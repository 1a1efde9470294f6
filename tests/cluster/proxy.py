"""Stands between the router and the API server: says what passed, cuts, freezes, and translates for an older server."""

import http.client
import json
import re
import ssl
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from control_plane import API_ADDRESS, API_PORT, Certificates
from older import newer_slice

PROXY_ADDRESS = "10.64.0.2"
PROXY_PORT = 6443

NEW, OLD = "/apis/discovery.k8s.io/v1/", "/apis/discovery.k8s.io/v1beta1/"


@dataclass
class Passed:
    """One request, and for a watch the kinds of its events."""

    path: str
    query: dict
    status: int = 0
    events: list[str] = field(default_factory=list)
    ended: bool = False

    @property
    def watches(self) -> bool:
        return self.query.get("watch") == "true"


class Proxy:
    """Requests are kept in `passed`. `translates` is for a server without discovery.k8s.io/v1."""

    def __init__(self, certificates: Certificates, translates: bool):
        self.passed: list[Passed] = []
        self.translates = translates
        # A shorter time-out for watches than the router asks for.
        self.watch_seconds: int | None = None
        self._certificates = certificates
        self._upstream = ssl.create_default_context(cafile=str(certificates.authority))
        self._open: set = set()
        self._frozen: set = set()
        self._server = None
        self.start()

    def start(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                proxy._open.add(self.connection)

            def finish(self):
                proxy._open.discard(self.connection)
                super().finish()

            def do_GET(self):
                proxy._forward(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, address):
                """Connections break here: that is what it is for."""

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificates.server, self._certificates.key)
        self._server = Server((PROXY_ADDRESS, PROXY_PORT), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Nobody listens any more, and every connection breaks."""
        self._server.shutdown()
        self._server.server_close()
        self.cut()

    def cut(self):
        for connection in list(self._open):
            try:
                connection.shutdown(2)
            except OSError:
                pass

    def freeze(self):
        """Connections that are there stay, and nothing comes by them any more. New ones are served."""
        self._frozen |= set(self._open)

    def lists(self) -> int:
        return sum(not each.watches for each in self.passed)

    def watches(self) -> list[Passed]:
        return [each for each in self.passed if each.watches]

    def _forward(self, handler):
        url = urllib.parse.urlsplit(handler.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        passed = Passed(url.path, query)
        self.passed.append(passed)
        if passed.watches and self.watch_seconds:
            query = {**query, "timeoutSeconds": str(self.watch_seconds)}
        path = url.path.replace(NEW, OLD, 1) if self.translates else url.path
        upstream = http.client.HTTPSConnection(API_ADDRESS, API_PORT, context=self._upstream)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in ("host", "accept-encoding")}
        try:
            upstream.request("GET", f"{path}?{urllib.parse.urlencode(query)}", headers=headers)
            answer = upstream.getresponse()
        except OSError:
            # As if nobody were there.
            handler.close_connection = True
            upstream.close()
            return
        passed.status = answer.status
        try:
            if passed.watches and answer.status == 200:
                self._pass_events(handler, answer, passed)
            else:
                self._pass_whole(handler, answer)
        finally:
            passed.ended = True
            upstream.close()

    def _pass_whole(self, handler, answer):
        body = answer.read()
        if self.translates and answer.status == 200:
            body = re.sub(rb'"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1beta1"',
                          b'"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1"', body)
            body = json.dumps(newer_slice(json.loads(body))).encode()
        if handler.connection in self._frozen:
            threading.Event().wait()
        handler.send_response(answer.status)
        handler.send_header("content-type", answer.getheader("content-type", "application/json"))
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _pass_events(self, handler, answer, passed):
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        try:
            for line in answer:
                event = json.loads(line)
                code = f" {event['object'].get('code')}" if event["type"] == "ERROR" else ""
                passed.events.append(event["type"] + code)
                if self.translates:
                    line = json.dumps({**event, "object": newer_slice(event["object"])}).encode() + b"\n"
                if handler.connection in self._frozen:
                    threading.Event().wait()
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            if handler.connection in self._frozen:
                threading.Event().wait()
            handler.wfile.write(b"0\r\n\r\n")
        except (OSError, http.client.HTTPException):
            handler.close_connection = True
