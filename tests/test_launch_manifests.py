"""The manifests against the API's schemas, and through kubectl to a server."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from surefoot.launch import manifests
from surefoot.launch.ask import KINDS, Ask, settled
from tests import fake_kube_api
from tests.conftest import ROOT

KUBERNETES = "1.32"
ASK = settled(Ask(world="k8s", image="i", bucket="b", nodes=2, gpus=8, flags=("--base_model", "m")))


def schema(name: str) -> Any:
    return json.loads(gzip.decompress((ROOT / f"tests/schemas/{name}.json.gz").read_bytes()))


def strict(node: Any, *, is_top: bool = True) -> Any:
    """A CustomResourceDefinition's schema as JSON Schema that refuses unknown keys, as the API server does for them."""
    if isinstance(node, list):
        return [strict(part, is_top=False) for part in node]
    if not isinstance(node, dict):
        return node
    changed = {key: strict(value, is_top=False) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
        changed["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    if is_top:
        changed["properties"]["metadata"] = {"type": "object"}
    return changed


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, or kubernetes_validate.ValidationError for the kinds of Kubernetes itself."""
    kind = document["kind"].lower()
    if (ROOT / f"tests/schemas/{kind}.json.gz").exists():
        jsonschema.validate(document, strict(schema(kind)))
        for pod in pods(document):
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod})
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pods(node: Any) -> list[dict[str, Any]]:
    """Every complete pod spec inside a document."""
    if isinstance(node, list):
        return [pod for part in node for pod in pods(part)]
    if not isinstance(node, dict):
        return []
    is_pod = "containers" in node and all("image" in container for container in node["containers"])
    return [node] if is_pod else [pod for part in node.values() for pod in pods(part)]


def documents(kind: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifests.render(manifests.K8S[kind](ASK))))


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_when_validated_then_has_only_what_the_api_knows(kind: str) -> None:
    for document in documents(kind):
        validate(document)


def test_shipped_claim_when_validated_then_is_right() -> None:
    validate(yaml.safe_load((ROOT / "launch/k8s/claim.yaml").read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_validation_when_a_key_is_wrong_then_refuses(kind: str) -> None:
    document = documents(kind)[-1]
    document["spec"]["no_such_key"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match="no_such_key"):
        validate(document)


@pytest.mark.parametrize("kind", KINDS)
def test_pod_when_rendered_then_has_no_rights_and_keeps_its_runs(kind: str) -> None:
    text = manifests.render(manifests.K8S[kind](ASK))
    for kept in (
        "runAsNonRoot: true",
        "allowPrivilegeEscalation: false",
        "medium: Memory",
        "claimName: surefoot-runs",
        "terminationGracePeriodSeconds: 180",
    ):
        assert kept in text
    assert "privileged: true" not in text
    assert "hostPath" not in text


def test_task_when_validated_then_has_only_what_skypilot_knows() -> None:
    task = yaml.safe_load(manifests.render(manifests.sky(ASK)))
    known = schema("skypilot")
    jsonschema.validate(task, known["task"])
    jsonschema.validate(task["resources"], known["resources"])
    jsonschema.validate(task["file_mounts"]["/runs"], known["storage"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**task, "nodes": 2}, known["task"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_submit_when_there_is_a_server_then_it_has_the_documents_and_delete_takes_them_away(kind: str, tmp_path: Path) -> None:
    with fake_kube_api.serving() as server:
        cluster = {
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        config = {"apiVersion": "v1", "kind": "Config", **cluster, "users": [{"name": "u", "user": {}}], "current-context": "c"}
        (tmp_path / "config").write_text(json.dumps(config))
        environment = {**os.environ, "KUBECONFIG": str(tmp_path / "config"), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        words = ["k8s", "--kind", kind, "--image", "i", "--nodes", "2", "--gpus", "8"]
        flags = ["--base_model", "/runs/m", "--data_path", "/runs/d.json", "--output_dir", "/runs/o", "--run_name", "a $(NODES)\nb"]
        run = [sys.executable, "-m", "surefoot.launch", *words, "--submit", "--", *flags]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "created" in done.stdout
        shown = done.stdout[: done.stdout.rindex("\n", 0, done.stdout.index(" created"))]
        assert len(server.stored) == len(list(yaml.safe_load_all(shown)))
        assert all(document["metadata"]["name"] == "surefoot" for document in server.stored.values())
        (tmp_path / "made.yaml").write_text(shown)
        delete = ["kubectl", "delete", "--wait=false", "--filename", str(tmp_path / "made.yaml")]
        subprocess.run(delete, env=environment, check=True, capture_output=True)
        assert server.stored == {}
