"""A Kubernetes API server for kubectl create, get and delete: it keeps what it is sent and checks nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RESOURCES = {
    "/api/v1": {"services": "Service", "persistentvolumeclaims": "PersistentVolumeClaim"},
    "/apis/batch/v1": {"jobs": "Job"},
    "/apis/jobset.x-k8s.io/v1alpha2": {"jobsets": "JobSet"},
    "/apis/trainer.kubeflow.org/v1alpha1": {"trainjobs": "TrainJob", "trainingruntimes": "TrainingRuntime"},
}


class Server(ThreadingHTTPServer):
    """stored: path to object."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored: dict[str, Any] = {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/version":
            self._answer(200, {"major": "1", "minor": "32", "gitVersion": "v1.32.0"})
        elif path == "/api":
            self._answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            names = [api.removeprefix("/apis/") for api in RESOURCES if api.startswith("/apis/")]
            groups = [{"name": name.split("/")[0], "versions": [{"groupVersion": name, "version": name.split("/")[1]}]} for name in names]
            self._answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif path in RESOURCES:
            found = [
                {
                    "name": plural,
                    "singularName": kind.lower(),
                    "kind": kind,
                    "namespaced": True,
                    "verbs": ["create", "delete", "get", "list"],
                }
                for plural, kind in RESOURCES[path].items()
            ]
            group = path.removeprefix("/apis/").removeprefix("/api/")
            self._answer(200, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": found})
        elif path == "/openapi/v3":
            self._answer(200, {"paths": {api[1:]: {"serverRelativeURL": f"/openapi/v3{api}"} for api in RESOURCES}})
        elif path.removeprefix("/openapi/v3") in RESOURCES:
            self._answer(200, self._openapi(path.removeprefix("/openapi/v3")))
        else:
            self._object(path)

    def _openapi(self, api: str) -> dict[str, Any]:
        """Says only that the server checks fields itself, so that kubectl does not."""
        group, _, version = api.removeprefix("/apis/").removeprefix("/api/").rpartition("/")
        paths = {}
        for plural, kind in RESOURCES[api].items():
            patch = {
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
            }
            paths[f"{api}/namespaces/{{namespace}}/{plural}/{{name}}"] = {"patch": patch}
        return {"openapi": "3.0.0", "info": {"title": "fake", "version": "1"}, "paths": paths}

    def do_POST(self) -> None:
        sent = json.loads(self._body())
        self.server.stored[f"{self.path.partition('?')[0]}/{sent['metadata']['name']}"] = sent
        self._answer(201, sent)

    def do_DELETE(self) -> None:
        self._body()
        path = self.path.partition("?")[0]
        if path in self.server.stored:
            self._answer(200, self.server.stored.pop(path))
        else:
            self._object(path)

    def _object(self, path: str) -> None:
        if path in self.server.stored:
            self._answer(200, self.server.stored[path])
        else:
            self._answer(404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
