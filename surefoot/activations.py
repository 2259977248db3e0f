"""kept(): what a decoder layer keeps from its forward for its backward pass, tensor by tensor. Pure numbers, no torch.

Counted with torch.autograd.graph.saved_tensors_hooks, which tests/test_memory.py repeats; compiled layers too (torch 2.13), whose tensors
are the choice of torch's partitioner: it keeps what is smaller, such as o_proj's output and not the residual stream after it.
"""

from __future__ import annotations

from surefoot.decoder import ATTENTION, MLP, Decoder, Job


def kept(s: Decoder, job: Job) -> dict[str, float]:
    """Bytes by name, of one layer that does not recompute, for all tokens of a pass."""
    per_token = _attention(s, job) | _mlp(s, job) | _adapter_inputs(s, job) | _adapter_outputs(s, job)
    per_token["norm inputs"] = 4 * s.hidden + (_small(job) if job.is_lean else 4) * s.hidden + 8
    if job.method == "full":
        per_token["norms before their gain"] = 2 * 4 * s.hidden
    return {name: size * job.tokens for name, size in per_token.items()} | _weight_copies(s, job)


def _small(job: Job) -> int:
    """Bytes of a value of the compute dtype."""
    return 2 if job.is_cast else 4


def _output(job: Job, name: str) -> int:
    """Bytes of a value that a frozen linear layer gives: bitsandbytes gives back its input's dtype, fp32 but for o_proj."""
    return 4 if job.quantization != "none" and not job.is_fused and name != "o_proj" else _small(job)


def _attention(s: Decoder, job: Job) -> dict[str, float]:
    """Per token. Eager attention repeats keys and values for all heads and keeps its scores; kernels keep output and log-sum-exp."""
    small, is_eager = _small(job), job.attn_implementation == "eager"
    terms: dict[str, float] = {"queries, keys, values": small * (3 * s.query if is_eager else s.query + 2 * s.key)}
    if s.family == "qwen3":
        terms["query and key norm inputs"] = 4 * (s.query + s.key + s.heads + s.kv_heads)
    if is_eager:
        return terms | {"attention scores": (6 if job.is_cast and not job.is_lean else 4) * s.heads * job.length}
    return terms | {"attention output": small * s.query + 4 * s.heads}


def _mlp(s: Decoder, job: Job) -> dict[str, float]:
    """Per token."""
    output, makes_again = _output(job, "gate_proj"), job.is_lean or job.fuses_mlp(s)
    return {"gate and up": 2 * output * s.intermediate, "activated gate": 0 if makes_again else output * s.intermediate}


def _adapter_inputs(s: Decoder, job: Job) -> dict[str, float]:
    """Per token: inputs of layers that train. Plain PEFT casts them to fp32 and autocast back, a copy for each layer."""
    adapted, small = job.adapted(s), _small(job)
    names, is_eager = {one.name for one in adapted}, job.attn_implementation == "eager"
    terms: dict[str, float] = {} if job.method == "full" else {"low-rank outputs": small * job.lora_r * len(adapted)}
    if (job.is_cast and not job.is_fused and not job.is_lean) or job.lora_dropout:
        shared = s.query if job.method == "full" and not is_eager else 0  # the attention kernel's output
        terms["inputs of adapters"] = small * (sum(one.inputs for one in adapted) - shared)
        terms["dropout masks"] = sum(one.inputs for one in adapted) if job.lora_dropout else 0
        return terms
    groups = sum(not names.isdisjoint(group) for group in (ATTENTION[:3], MLP[:2]))
    has_product = "down_proj" in names and not job.fuses_mlp(s)
    copies_output = "o_proj" in names and (is_eager or (job.is_lean and not job.is_fused))
    return terms | {
        "normed inputs": small * s.hidden * groups,
        "input of o_proj": small * s.query if copies_output else 0,
        "SwiGLU product": small * s.intermediate if has_product else 0,
    }


def _adapter_outputs(s: Decoder, job: Job) -> dict[str, float]:
    """Per token: the products DoRA keeps for its magnitudes' gradient. PEFT keeps the base's (less its fp32 bias) and the adapter's."""
    if job.method != "dora":
        return {}
    adapted, small = job.adapted(s), _small(job)
    if job.is_fused:
        anyway = {*MLP[:2]} if job.fuses_mlp(s) else set()  # they are gate and up
        anyway |= {"o_proj"} if job.is_lean else set()  # it is kept for the norm
        return {"raw outputs": small * sum(one.outputs for one in adapted if one.name not in anyway)}
    if job.lora_dropout:
        return {"base and low-rank products": 2 * small * sum(one.outputs for one in adapted)}
    base = {one: 4 if one.name in s.biased else _output(job, one.name) for one in adapted}
    return {"base and low-rank products": sum((size + small) * one.outputs for one, size in base.items())}


def _weight_copies(s: Decoder, job: Job) -> dict[str, float]:
    """Per layer: 16-bit copies that autocast makes of fp32 weights and autograd keeps; the fused layers keep the weights themselves."""
    adapted = job.adapted(s)
    uncast = job.is_cast and job.quantization == "none" and job.frozen_dtype == "fp32"
    copied = [one for one in s.linears if uncast and not (job.is_fused and one in adapted)]
    casts_again = job.is_cast and (uncast or not job.has_own_products)
    again = adapted if job.method == "dora" and job.lora_dropout and (casts_again or job.quantization != "none") else ()
    plain = () if job.is_fused or job.method == "full" or (job.has_own_products and job.method == "dora") else adapted
    recast = adapted if job.is_lean else plain
    return {
        "copies of frozen weights": 2 * sum(one.weights for one in copied),
        "copies for DoRA under dropout": _small(job) * sum(one.weights for one in again),
        "copies of adapters": 2 * job.lora_r * sum(one.inputs + one.outputs for one in recast) if job.is_cast else 0,
        "scales of DoRA": 12 * sum(one.outputs for one in plain) if job.method == "dora" else 0,
    }
