"""How many decoder layers recompute their activations: none, all, or as few as fit the GPU; where their inputs wait; what they spare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from surefoot.decoder import FAMILIES, MLP, Job, decoder_of
from surefoot.memory import GIB, Estimate, estimate
from surefoot.rules.attention import text_model
from surefoot.rules.desk import Choice, Desk

FREE = 0.08  # of the GPU's memory: CUDA's context, fragments, and what the arithmetic misses
EVERY_LAYER = -1  # of a model whose config.json does not say how many it has
NAME = "use_gradient_checkpointing"
OFFLOAD = ("offload", "unsloth")
HOST_SHARE = 0.5  # of the host's memory, which its processes may pin for layer inputs
ADDING = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # whose layers add down_proj's output to the residual stream and end there


class _Way(NamedTuple):
    """How to recompute: how many layers, where their inputs wait, each with its reason, and what that takes."""

    layers: int
    layers_reason: str
    offloads: bool
    offload_reason: str
    spares: bool
    made: Estimate | None

    def fits(self, desk: Desk) -> bool:
        gpu = desk.machine.gpu
        return gpu is None or self.made is None or self.made.gib <= (1 - FREE) * gpu.memory_gib


def recompute(desk: Desk, values: Mapping[str, Any]) -> Iterator[Choice]:
    """The flag as it was given, how many layers recompute because of it, where their inputs wait, and whether they leave out
    down_proj. Leaves the estimate on the desk.

    Args:
        values: everything decided before, by name.
    """
    asked = getattr(desk.config, NAME)
    if values["backend"] == "unsloth":
        yield from _left_to_unsloth(desk)
        return
    yield desk.as_given(NAME, "unsloth's own needs the unsloth backend: as offload" if asked == "unsloth" else "")
    obstacle = _obstacle(desk, values)
    plain = None if obstacle else _estimate(desk, values)
    must_repeat = _must_repeat(desk, values)
    choices = (False,) if must_repeat else (True, False) if values["method"] == "dora" else (True,)
    ways = [_way(desk, plain, obstacle, spares=spares) for spares in choices]
    way = next((way for way in ways if way.fits(desk)), ways[-1])
    source = "auto" if asked in ("auto", "selective") else desk.config.source(NAME)
    yield Choice("recompute_layers", way.layers, source, way.layers_reason)
    yield Choice("offload_inputs", way.offloads, source, way.offload_reason)
    yield Choice("spares_down", way.spares and way.layers != 0, "auto", _spared(way, must_repeat, values["method"]) if way.layers else "")
    if way.made is not None:
        desk.estimate = way.made
        _warn(desk, way.made)
    elif desk.machine.gpus:
        desk.notes.append(f"memory was not estimated: {obstacle}")
        _advise_whole_weights(desk, values)


def _advise_whole_weights(desk: Desk, values: Mapping[str, Any]) -> None:
    """A note where an engine keeps the weights in pieces that fit the GPU as a whole: gathering them costs a tenth of a step and more."""
    machine, gpu = desk.machine, desk.machine.gpu
    if gpu is None or not machine.cuts_weights or _unknown(desk, values):
        return
    plain = _estimate(desk, values)
    if plain is not None and (whole := plain.at(is_ddp=True)).gib <= (1 - FREE) * gpu.memory_gib:
        desk.notes.append(
            f"{machine.strategy} gathers every layer's weights twice a step, and this GPU has room for all of them "
            f"({whole.gib:.1f} of {gpu.memory_gib:g} GiB estimated): profiles/ddp.yaml was the faster one (docs/measured.md)"
        )


def _way(desk: Desk, plain: Estimate | None, obstacle: str, *, spares: bool) -> _Way:
    plain = plain and plain.at(spares_down=spares)
    count, count_reason = _layers(desk, plain, obstacle)
    made = plain and plain.at(recompute_layers=count)
    offloads, why = _offload(desk, made)
    return _Way(count, count_reason, offloads, why, spares, made and made.at(offload_inputs=offloads))


def _must_repeat(desk: Desk, values: Mapping[str, Any]) -> str:
    """Why recomputing layers compute down_proj again, empty if they need not."""
    found, targets = text_model(desk), values["target_modules"]
    if not values["fused_adapters"]:
        return "PEFT's own layers make every product again" if values["method"] != "full" else "every weight is trained"
    if values["quantization"] == "int8":
        return "int8 layers stay with PEFT"
    if desk.config.lora_dropout:
        return "with dropout each layer of the MLP is an operation of its own"
    if targets is not None and not {*MLP} <= {*targets}:
        return f"not all of {', '.join(MLP)} have an adapter"
    if found.get("model_type") not in ADDING:
        return f"model type {found.get('model_type')} is not one of {', '.join(ADDING)}"
    is_fused = found.get("hidden_act", "silu") == "silu" and not found.get("mlp_bias")
    return "" if is_fused else "the MLP has biases, or is no SwiGLU"


def _spared(way: _Way, must_repeat: str, method: str) -> str:
    if must_repeat or not way.spares:
        return must_repeat or "the GPU has no room to keep down_proj's products"
    if method != "dora":
        return "no backward pass needs down_proj's product"
    place = "in host memory" if way.offloads else f"{way.made.kept_products / GIB:.1f} GiB" if way.made else "of each layer"
    return f"down_proj's product is kept for the magnitude's gradient ({place})"


def _left_to_unsloth(desk: Desk) -> Iterator[Choice]:
    """Its own recompute, which offloads what it keeps to the host; nothing is estimated, since its layers keep other activations."""
    asked = getattr(desk.config, NAME)
    if asked == "auto":
        yield Choice(NAME, "unsloth", "auto", "Unsloth's own, as its users expect; False is faster where the memory allows it")
    else:
        yield desk.as_given(NAME, "through Unsloth")
    yield Choice("recompute_layers", 0, "auto", "left to Unsloth")
    yield Choice("offload_inputs", False, "auto", "left to Unsloth")
    if desk.machine.gpus:
        desk.notes.append("memory was not estimated: Unsloth's layers keep other activations")


def _obstacle(desk: Desk, values: Mapping[str, Any]) -> str:
    """Why there is no estimate."""
    engine = desk.machine.engine
    if engine in ("deepspeed", "fsdp"):
        return f"{'DeepSpeed' if engine == 'deepspeed' else 'FSDP'} splits weights and state between processes"
    return _unknown(desk, values)


def _unknown(desk: Desk, values: Mapping[str, Any]) -> str:
    """Why there is no estimate under any engine."""
    found, targets = desk.inputs.model_config, values["target_modules"]
    if found is None:
        return "no config.json was found"
    decoder = decoder_of(found)
    if decoder is None:
        return f"model type {found.get('model_type')} is not one of {', '.join(FAMILIES)}, or its config.json lacks a size"
    unknown = set(targets or ()) - {one.name for one in decoder.linears}
    return f"target_modules names {', '.join(sorted(unknown))}" if unknown else ""


def _estimate(desk: Desk, values: Mapping[str, Any]) -> Estimate | None:
    """Without recompute, for the longest rows that the flags allow."""
    c, micro = desk.config, values["per_device_train_batch_size"]
    rows, length = micro, c.cutoff_len
    if values["packing"] == "on" or (values["packing"] == "auto" and values["pack_len"]):
        rows, length = 1, values["pack_len"] or micro * c.cutoff_len
    names = {f.name for f in dataclasses.fields(Job)} & values.keys()
    given: dict[str, Any] = {"lora_r": c.lora_r, "lora_dropout": c.lora_dropout, "is_ddp": desk.machine.engine == "ddp"}
    given |= {name: values[name] for name in names} | {"rows": rows, "length": -(-length // 8) * 8}
    decoder = decoder_of(desk.inputs.model_config)
    return None if decoder is None else estimate(decoder, Job(**given))


def _layers(desk: Desk, plain: Estimate | None, obstacle: str) -> tuple[int, str]:
    """How many layers recompute, and why."""
    asked, total = getattr(desk.config, NAME), _number_of_layers(desk)
    if asked is False:
        return 0, ""
    if asked in (True, *OFFLOAD) or (asked == "selective" and total == EVERY_LAYER):
        return total, "every layer"
    gpu = desk.machine.gpu
    if plain is None or gpu is None:
        why = "no GPU to fill" if gpu is None else f"nothing was estimated: {obstacle}"
        return (0, f"{why}: none") if asked == "auto" else (max(1, total // 2), f"{why}: half of {total}")
    room = (1 - FREE) * gpu.memory_gib
    least = 0 if asked == "auto" else 1
    fitting = next((count for count in range(least, total + 1) if plain.at(recompute_layers=count).gib <= room), total)
    share = "none" if fitting == 0 else f"{fitting} of {total}"
    made = f", {plain.at(recompute_layers=fitting).gib:.1f} with it" if fitting else ""
    return fitting, f"estimate {plain.gib:.1f} GiB without recompute{made}, {gpu.memory_gib:g} GiB less {FREE:.0%}: {share}"


def _offload(desk: Desk, made: Estimate | None) -> tuple[bool, str]:
    """Whether the recomputing layers' inputs wait in host memory, and why: where that was asked for, or where auto fits no other way.

    Args:
        made: the estimate with the chosen layers, and their inputs on the GPU.
    """
    asked, gpu, machine = getattr(desk.config, NAME), desk.machine.gpu, desk.machine
    if gpu is None:
        return False, "no GPU whose memory it would free" if asked in OFFLOAD else ""
    if asked in OFFLOAD:
        return True, "as asked"
    if asked not in ("auto", "selective") or made is None or made.gib <= (1 - FREE) * gpu.memory_gib:
        return False, ""
    away = made.at(offload_inputs=True)
    pinned, room = away.in_host_memory / GIB * len(machine.gpus), HOST_SHARE * machine.memory_gib
    if pinned > room:
        return False, f"the inputs of all layers, {pinned:.1f} GiB, are more than half of the host's memory"
    return True, f"every layer recomputes and {made.gib:.1f} GiB do not fit; with their inputs in host memory {away.gib:.1f}"


def _number_of_layers(desk: Desk) -> int:
    found = text_model(desk).get("num_hidden_layers")
    return found if isinstance(found, int) else EVERY_LAYER


def _warn(desk: Desk, made: Estimate) -> None:
    """A note where the estimate is more than the GPU has, with the ways out."""
    gpu, job = desk.machine.gpu, made.job
    if gpu is None or made.gib <= (1 - FREE) * gpu.memory_gib:
        return
    ways = [f"--per_device_train_batch_size={job.rows // 2}"] if job.rows > 1 else []
    ways += [] if job.recompute_layers == made.decoder.layers else [f"--{NAME}=auto"]
    ways += [f"--{NAME}=offload"] if job.recompute_layers == made.decoder.layers and not job.offload_inputs else []
    ways += ["--load_4bit=True"] if job.quantization == "none" and job.method != "full" else []
    ways += [f"a --cutoff_len below {desk.config.cutoff_len}"]
    desk.notes.append(
        f"the estimate of {made.gib:.1f} GiB does not fit {gpu.name} ({gpu.memory_gib:g} GiB less {FREE:.0%}): "
        f"the run may end for lack of memory. Ways out: {', '.join(ways)}"
    )
