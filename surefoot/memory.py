"""Memory arithmetic: the bytes one process holds on its GPU, by kind, from config.json and the values of a plan. Pure numbers, no torch.

tests/test_memory.py holds it against what autograd keeps, counted on a CPU, and against peaks measured on a GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from surefoot.activations import kept
from surefoot.decoder import Decoder, Job

GIB = 2**30
WEIGHT_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0, "fp32": 4.0, "bf16": 2.0, "fp16": 2.0}  # NF4: double quantization
OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2}  # of both moments of one parameter; otherwise fp32
CHUNK = {True: 2**28, False: 2**26}  # logits that the chunked loss holds at once, compiled or not: ops/loss.py
CHUNK_BYTES = {True: 6, False: 20}  # of one of these, with its gradient and the chunk's before it
ON_THE_WAY = 3  # layer inputs, or kept products, that are on their way to or from host memory, when they wait there
WORKSPACE = 0.1 * GIB  # of cuBLAS
ROUNDING = 0.005  # of what is allocated during a step: the allocator's blocks


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by kind at the peak of a step. Of `layer_backward` and `head` only the greater one is there at a time."""

    decoder: Decoder
    job: Job
    frozen_weights: int
    embeddings: int
    trained_weights: int
    gradients: int
    optimizer_state: int
    activations: int
    layer_inputs: int
    kept_products: int
    layer_backward: int
    head: int
    overhead: int

    @property
    def parts(self) -> dict[str, int]:
        found = dataclasses.asdict(self)
        return {name.replace("_", " "): size for name, size in found.items() if name not in ("decoder", "job")}

    @property
    def total(self) -> int:
        return sum(self.parts.values()) - min(self.layer_backward, self.head)

    @property
    def gib(self) -> float:
        return self.total / GIB

    def as_record(self) -> dict[str, Any]:
        """For run.json: what was estimated for, and bytes by kind."""
        return {"job": dataclasses.asdict(self.job), "bytes": {**self.parts, "total": self.total}, "gib": round(self.gib, 3)}

    @property
    def in_host_memory(self) -> int:
        """Bytes of layer inputs and kept products that wait in pinned host memory."""
        if not self.job.offload_inputs:
            return 0
        return min(self.job.recompute_layers, self.decoder.layers) * (
            _layer_input(self.decoder, self.job) + _kept_product(self.decoder, self.job)
        )

    def at(self, **changed: Any) -> Estimate:
        """The same job with other rows, length, recompute_layers, offload_inputs or spares_down."""
        return estimate(self.decoder, dataclasses.replace(self.job, **changed))


def estimate(decoder: Decoder, job: Job) -> Estimate:
    """The bytes of one process at the peak of its steps."""
    recomputed = min(job.recompute_layers, decoder.layers)
    here = min(recomputed, ON_THE_WAY) if job.offload_inputs else recomputed  # whose inputs and products are on the GPU
    layer = int(sum(kept(decoder, job).values()))
    backward = max(_backward(decoder, job), _dora_norm(decoder, job))
    trained = trained_parameters(decoder, job) * 4
    parts = {
        "activations": (decoder.layers - recomputed) * layer,
        "layer_inputs": here * _layer_input(decoder, job),
        "kept_products": here * _kept_product(decoder, job) + recomputed * _kept_low_rank(job),
        "layer_backward": backward + (layer if recomputed == decoder.layers else 0),
        "head": int(_head(decoder, job)),
    }
    moving = sum(parts.values()) - min(parts["layer_backward"], parts["head"])
    return Estimate(
        decoder=decoder,
        job=job,
        frozen_weights=int(_frozen(decoder, job)),
        embeddings=_embeddings(decoder, job),
        trained_weights=trained,
        gradients=trained * (2 if job.is_ddp else 1),  # DDP's buckets are a second copy
        optimizer_state=trained // 4 * OPTIMIZER_BYTES.get(job.optim, 8),
        overhead=int(WORKSPACE + ROUNDING * moving),
        **parts,
    )


def trained_parameters(decoder: Decoder, job: Job) -> int:
    if job.method == "full":
        return decoder.layers * sum(one.weights for one in decoder.linears) + _embedding_weights(decoder)
    per_output = 1 if job.method == "dora" else 0
    return decoder.layers * sum(job.lora_r * (one.inputs + one.outputs) + per_output * one.outputs for one in job.adapted(decoder))


def _layer_input(decoder: Decoder, job: Job) -> int:
    """The residual stream before a layer, fp32."""
    return 4 * decoder.hidden * job.tokens


def _kept_product(decoder: Decoder, job: Job) -> int:
    """down_proj's raw product of a recomputing layer, for the gradient of DoRA's magnitude."""
    return (2 if job.is_cast else 4) * decoder.hidden * job.tokens if job.spares_down and job.method == "dora" else 0


def _kept_low_rank(job: Job) -> int:
    """down_proj's x A^T of a recomputing layer, which stays on the GPU."""
    return (2 if job.is_cast else 4) * job.lora_r * job.tokens if job.spares_down else 0


def _embedding_weights(decoder: Decoder) -> int:
    return decoder.vocabulary * decoder.hidden * (1 if decoder.is_tied else 2)


def _frozen(decoder: Decoder, job: Job) -> float:
    if job.method == "full":
        return 0
    stored = job.frozen_dtype if job.quantization == "none" else job.quantization
    return decoder.layers * sum(one.weights for one in decoder.linears) * WEIGHT_BYTES[stored]


def _embeddings(decoder: Decoder, job: Job) -> int:
    return 0 if job.method == "full" else int(_embedding_weights(decoder) * WEIGHT_BYTES[job.frozen_dtype])


def _backward(s: Decoder, job: Job) -> int:
    """Gradients and temporaries of one layer's backward pass, its MLP's or its attention's."""
    small = 2 if job.is_cast else 4
    stream = 3 * 4 * s.hidden
    mlp = (3 if job.enable_torch_compile and not job.fuses_mlp(s) else 4) * small * s.intermediate
    if not job.is_fused and not job.enable_torch_compile and job.method != "full":
        mlp += (4 if job.method == "lora" else 12) * s.intermediate  # PEFT's fp32 casts
    scores = 10 * s.heads * job.length if job.attn_implementation == "eager" else 0
    return (stream + max(mlp, scores)) * job.tokens


def _dora_norm(s: Decoder, job: Job) -> int:
    """PEFT makes B A from an identity matrix of the layer's inputs, and W + s B A in fp32, for each layer in each forward pass."""
    if job.method != "dora" or job.has_own_products:
        return 0
    identity = 6 if job.is_cast else 4
    sums = 14 if job.frozen_dtype == "fp32" and job.quantization == "none" else 18
    return max(max(identity * one.inputs**2 + 2 * one.weights, sums * one.weights) for one in job.adapted(s))


def _head(s: Decoder, job: Job) -> float:
    """Logits with their gradient, the final norm, and the 16-bit copy of a head that is stored in fp32."""
    copy = 2 * s.vocabulary * s.hidden if job.is_cast and (job.frozen_dtype == "fp32" or job.method == "full") else 0
    if job.fused_loss:
        logits = CHUNK_BYTES[job.enable_torch_compile] * min(job.tokens * s.vocabulary, CHUNK[job.enable_torch_compile])
        return logits + copy + 3 * 4 * s.hidden * job.tokens
    return (12 * s.vocabulary + 4 * s.hidden) * job.tokens + copy
