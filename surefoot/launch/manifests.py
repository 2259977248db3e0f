"""Kubernetes and SkyPilot documents as plain values; render() makes their text."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from surefoot.launch.ask import Ask

PORT = 29500
USER = 1000
RUNS = "/runs"
ENTRYPOINT = "/surefoot/docker/entrypoint.sh"
MISTAKES = [2, 3, 4]  # exit codes that come again however often the pod is started; 5 is also that of a node that lost another
PREEMPTED = 75
SHM = "16Gi"
GPU = "nvidia.com/gpu"
TRIES = 3  # after the first, for what is neither a mistake nor a preemption


# where one node fails all start again, unless it was a mistake
RESTARTS = {
    "maxRestarts": TRIES,
    "rules": [{"name": "mistakes", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
}


def render(documents: list[dict[str, Any]]) -> str:
    """The documents as YAML; every text is quoted where YAML would read it as something else."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks where YAML can, and each list anew instead of a reference to an equal one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def literal(word: str) -> str:
    """A word that the kubelet passes on as it is: it reads $(NAME) in args as a variable and $$ as $."""
    return word.replace("$", "$$")


def job(ask: Ask) -> list[dict[str, Any]]:
    """An Indexed Job, and the headless Service that gives its pods names."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": ask.name},
        "spec": {"clusterIP": "None", "selector": {"job-name": ask.name}, "publishNotReadyAddresses": True, "ports": [{"port": PORT}]},
    }
    pod = _pod(ask, "finetune", _indexed_env(ask, f"{ask.name}-0.{ask.name}"))
    spec = _indexed(ask, {**pod, "subdomain": ask.name}, TRIES * ask.nodes)  # where one node fails the others do
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": ask.name}, "spec": spec}]


def jobset(ask: Ask) -> list[dict[str, Any]]:
    pod = _pod(ask, "finetune", _indexed_env(ask, f"{ask.name}-node-0-0.{ask.name}"))
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": ask.name, "publishNotReadyAddresses": True},
        "failurePolicy": RESTARTS,
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": _indexed(ask, pod, 0)}}],
    }
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": ask.name}, "spec": spec}]


def trainjob(ask: Ask) -> list[dict[str, Any]]:
    """A Kubeflow TrainJob with a TrainingRuntime of its own; the operator tells the processes of each other in PET_*."""
    api = "trainer.kubeflow.org/v1alpha1"
    translated = (
        "NODES=$PET_NNODES NODE_RANK=$PET_NODE_RANK GPUS=$PET_NPROC_PER_NODE MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT"
    )
    pod = _pod(ask, "node", _env(ask))
    for moved in ("args", "resources", "image"):
        pod["containers"][0].pop(moved)
    replicated = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {**_failures("node", 0), "template": {"spec": pod}},
        },
    }
    runtime = {
        "apiVersion": api,
        "kind": "TrainingRuntime",
        "metadata": {"name": ask.name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": ask.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": RESTARTS, "replicatedJobs": [replicated]}},
        },
    }
    trainer = {
        "image": ask.image,
        "command": ["bash", "-c", f'{translated} exec "$@"', "node", ENTRYPOINT],
        "args": [literal(word) for word in ask.flags],
        "numNodes": ask.nodes,
        "numProcPerNode": ask.processes,
        "resourcesPerNode": _resources(ask),
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": ask.name}
    return [
        runtime,
        {"apiVersion": api, "kind": "TrainJob", "metadata": {"name": ask.name}, "spec": {"runtimeRef": reference, "trainer": trainer}},
    ]


def _indexed(ask: Ask, pod: dict[str, Any], tries: int) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "completions": ask.nodes,
        "parallelism": ask.nodes,
        **_failures("finetune", tries),
        "template": {"spec": pod},
    }


def _failures(container: str, tries: int) -> dict[str, Any]:
    """A preempted pod is started again and not counted, a mistake of the user's ends the job at once, anything else has `tries` more."""
    rules = [
        {"action": "Ignore", "onExitCodes": {"containerName": container, "operator": "In", "values": [PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": MISTAKES}},
    ]
    return {"backoffLimit": tries, "podFailurePolicy": {"rules": rules}}


def _pod(ask: Ask, container: str, env: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": ask.grace_s,
        "automountServiceAccountToken": False,
        **({} if ask.is_cpu else {"tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]}),
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": ask.image,
                "args": [literal(word) for word in ask.flags],
                "workingDir": RUNS,
                "env": env,
                "resources": _resources(ask),
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "runs", "mountPath": RUNS}, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": ask.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHM}},
        ],
    }  # fmt: skip


def _resources(ask: Ask) -> dict[str, Any]:
    requests = {"requests": {"cpu": str(ask.cpus * ask.processes), "memory": f"{ask.memory * ask.processes}Gi"}}
    return requests if ask.is_cpu else {**requests, "limits": {GPU: str(ask.gpus)}}


def _env(ask: Ask) -> list[dict[str, Any]]:
    """The rows' and verdicts' cache and the Hub's lie on the volume, so that a pod that is started again finds them."""
    values = {"PROFILE": str(ask.profile), "XDG_CACHE_HOME": f"{RUNS}/.cache", "HF_HOME": f"{RUNS}/.cache/huggingface"}
    return [{"name": name, "value": value} for name, value in values.items()]


def _indexed_env(ask: Ask, master: str) -> list[dict[str, Any]]:
    values = {"NODES": str(ask.nodes), "GPUS": str(ask.processes), "MASTER_ADDR": master, "MASTER_PORT": str(PORT)}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [*_env(ask), *({"name": name, "value": value} for name, value in values.items()), {"name": "NODE_RANK", "valueFrom": index}]


def sky(ask: Ask) -> list[dict[str, Any]]:
    """A managed spot job: the bucket holds data and checkpoints, a lost or preempted cluster is brought up again and goes on.

    docker.sh starts the image there: as SkyPilot's image_id it would need root or sudo inside (skypilot-org/skypilot#4282).
    """
    accelerators = {} if ask.is_cpu else {"accelerators": f"{ask.accelerator}:{ask.gpus}"}
    run = [
        "export NODES=$SKYPILOT_NUM_NODES NODE_RANK=$SKYPILOT_NODE_RANK",
        'export MASTER_ADDR=$(head -n1 <<<"$SKYPILOT_NODE_IPS")',
        f"export IMAGE={shlex.quote(str(ask.image))} GPUS={ask.gpus} PROFILE={ask.profile}",
        f"cd {RUNS}",
        f'exec "$HOME/sky_workdir/launch/docker.sh" {shlex.join(ask.flags)}',
    ]
    return [
        {
            "name": ask.name,
            "num_nodes": ask.nodes,
            "resources": {
                **accelerators,
                "use_spot": True,
                "job_recovery": {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [PREEMPTED]},
            },
            "workdir": ".",
            "file_mounts": {RUNS: {"name": ask.bucket, "mode": "MOUNT_CACHED"}},
            "setup": f"docker pull {shlex.quote(str(ask.image))}\n",
            "run": "\n".join(run) + "\n",
        }
    ]


K8S: dict[str, Callable[[Ask], list[dict[str, Any]]]] = {"job": job, "jobset": jobset, "trainjob": trainjob}
