"""Attention, its kernels and compile: what the stage sets, single flags override, and the attention canary allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surefoot.rules import backend, model
from surefoot.rules.desk import Choice, Desk
from surefoot.verdicts import SDPA_KERNELS, Shape

LADDER = ("flash_attention_2", "sdpa", "eager")  # fast to plain; a rung that cannot be used gives way to the next
CLEARLY_SLOWER = 1.25  # short rows take as long as the launch of their kernels, and their times scatter


def to_check(desk: Desk) -> Shape | None:
    """The shape for the canary, None where eager is asked for, there is no GPU, or the model does not say its heads."""
    if not desk.machine.gpus or _wanted(desk) == "eager" or desk.inputs.model_config is None:
        return None
    found = text_model(desk)
    heads = found.get("num_attention_heads")
    size = found.get("head_dim") or (found["hidden_size"] // heads if heads and found.get("hidden_size") else None)
    if not heads or not size:
        return None
    return Shape(
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_dim=size,
        dtype=model.precision(desk).value,
        length=-(-desk.config.cutoff_len // 8) * 8,
        rows=desk.config.per_device_train_batch_size,
    )


def implementation(desk: Desk) -> Choice:
    c = desk.config
    wanted, missing = _wanted(desk), _missing(desk)
    given = c.attn_implementation is not None
    source = c.source("attn_implementation") if given else f"stage {c.stage}"
    if given and wanted == "flash_attention_2" and missing:
        desk.problems.append(f"--attn_implementation=flash_attention_2 {missing}. Use --attn_implementation=sdpa, or eager")
        return desk.as_given("attn_implementation")
    reasons = []
    ladder = [name for name in LADDER[LADDER.index(wanted) :] if name != "eager" or not backend.uses_unsloth(desk)]
    if not given and wanted != desk.stage.attn_implementation:
        source = "auto"
        reasons.append(f"Unsloth has no {desk.stage.attn_implementation} attention; flash-attn and xformers are off inside it")
    for name in ladder:
        obstacle = missing if name == "flash_attention_2" and missing else _failure(desk, name)
        if not obstacle:
            break
        reasons.append(f"{name} {obstacle}")
    else:
        desk.problems.append(f"no attention gives right gradients on this machine: {'; '.join(reasons)}. See scripts/doctor.py")
        return desk.as_given("attn_implementation")
    if reasons and given:
        desk.notes.append(f"--attn_implementation={wanted} is not used: {'; '.join(reasons)}. Stepping down to {name}")
    return Choice("attn_implementation", name, source if name == wanted else "auto" if given else source, "; ".join(reasons))


def _wanted(desk: Desk) -> str:
    if desk.config.attn_implementation is None and desk.stage.attn_implementation == "eager" and backend.uses_unsloth(desk):
        return "sdpa"
    return desk.config.attn_implementation or desk.stage.attn_implementation


def _missing(desk: Desk) -> str | None:
    """Why flash_attention_2 cannot run at all."""
    if not desk.machine.gpus:
        return "needs a CUDA GPU"
    return None if desk.machine.has("flash-attn") else "is not installed (pip install flash-attn --no-build-isolation)"


def _failure(desk: Desk, name: str) -> str:
    """What the canary has against an implementation; sdpa stands as long as one of its kernels does."""
    if desk.verdicts is None:
        return ""
    backends = [f"sdpa_{kernel}" for kernel in SDPA_KERNELS] if name == "sdpa" else [name]
    obstacles = [desk.verdicts.obstacle(backend, _masks(desk, backend)) for backend in backends]
    return "" if "" in obstacles else f"failed the canary ({'; '.join(obstacles)})"


def text_model(desk: Desk) -> dict[str, Any]:
    """The text model's part of config.json."""
    found = desk.inputs.model_config or {}
    text = found.get("text_config")
    return text if isinstance(text, dict) else found


def has_short_windows(desk: Desk) -> bool:
    """Whether the model has sliding windows shorter than a row."""
    found = text_model(desk)
    window = found.get("sliding_window") if found.get("use_sliding_window", True) else None
    return isinstance(window, int) and window < desk.config.cutoff_len


def varlen_obstacle(desk: Desk) -> str:
    """Why sdpa cannot give packed rows to torch's varlen kernel, a flash kernel that takes no mask."""
    if not desk.machine.gpus:
        return "varlen needs a CUDA GPU"
    if desk.config.disable_flash_sdpa:
        return "varlen is a flash kernel (--disable_flash_sdpa)"
    if has_short_windows(desk):
        return "varlen is not used with sliding windows shorter than a row"
    if text_model(desk).get("attention_dropout"):
        return "varlen has no attention dropout"
    if desk.verdicts is None:
        return "nothing has checked varlen on this machine"
    obstacle = desk.verdicts.obstacle("varlen", ("packed",))
    return f"varlen {obstacle}" if obstacle else ""


def _masks(desk: Desk, backend: str) -> tuple[str, ...]:
    """The masks that a backend meets in training: none but the causal flag, unless windows are shorter than a row or rows are packed."""
    explicit = ("explicit",) if has_short_windows(desk) else ()
    is_packed = desk.config.packing is True and (not backend.startswith("sdpa") or bool(varlen_obstacle(desk)))
    return ("causal", *explicit, *(("packed",) if is_packed else ()))


def kernels(desk: Desk, implementation: str) -> Iterator[Choice]:
    """Which of SDPA's kernels may run."""
    c = desk.config
    has_effect = implementation == "sdpa" and bool(desk.machine.gpus)
    idle = "" if has_effect else "no effect: only sdpa attention on a GPU reads it"
    off, source, reason = _cudnn(desk)
    if has_effect and not off and desk.verdicts is None:
        desk.notes.append(
            "cuDNN attention is on and nothing has checked it on this machine: with torch 2.11 to 2.14 its gradients are NaN "
            "for some lengths when a mask is passed (pytorch/pytorch#196678)"
        )
    yield Choice("disable_cudnn_sdpa", off, source, idle or reason)
    yield Choice("disable_flash_sdpa", c.disable_flash_sdpa, c.source("disable_flash_sdpa"), idle)
    barred = {"cudnn": "disable_cudnn_sdpa"} if off else {}
    barred |= {"flash": "disable_flash_sdpa"} if c.disable_flash_sdpa else {}
    barred |= {kernel: why for kernel in SDPA_KERNELS if kernel not in barred and (why := _kernel_failure(desk, kernel))}
    allowed = tuple(kernel for kernel in SDPA_KERNELS if kernel not in barred)
    yield Choice("sdpa_kernels", allowed, "auto", idle or "; ".join(f"{kernel} off: {why}" for kernel, why in barred.items()))


def _kernel_failure(desk: Desk, kernel: str) -> str:
    """Why a kernel gives wrong numbers here; one that merely does not take a case is never chosen for it."""
    masks = _masks(desk, f"sdpa_{kernel}")
    found = [desk.verdicts.of(f"sdpa_{kernel}", mask) for mask in masks] if desk.verdicts else []
    return next((f"{v.mask}: {v.reason}" for v in found if v is not None and v.state == "fail"), "")


def _cudnn(desk: Desk) -> tuple[bool, str, str]:
    """Whether cuDNN's kernel is off, by whose word, and why."""
    c, v = desk.config, desk.verdicts
    failure = _kernel_failure(desk, "cudnn")
    if c.disable_cudnn_sdpa is not None:
        if failure and not c.disable_cudnn_sdpa:
            desk.notes.append(f"--disable_cudnn_sdpa=False is not followed: the canary found {failure}")
            return True, "auto", failure
        return c.disable_cudnn_sdpa, c.source("disable_cudnn_sdpa"), ""
    source = f"stage {c.stage}"
    if desk.stage.disable_cudnn_sdpa is not None:
        return desk.stage.disable_cudnn_sdpa, source, "" if desk.stage.disable_cudnn_sdpa else "as the stage says"
    if v is None:
        return True, source, "until the canary has run on this machine"
    masks = _masks(desk, "sdpa_cudnn")
    if not v.passes("sdpa_cudnn", masks):
        return True, source, f"canary: {v.obstacle('sdpa_cudnn', masks)}"
    passed = "no mask is passed in training" if masks == ("causal",) else f"also under a mask ({', '.join(masks[1:])})"
    ours, flash = v.of("sdpa_cudnn", "causal"), v.of("sdpa_flash", "causal")
    if ours and flash and ours.milliseconds and flash.milliseconds and flash.state == "pass":
        ratio = flash.milliseconds / ours.milliseconds
        if ratio < 1 / CLEARLY_SLOWER:
            return True, source, f"canary: right, but takes {1 / ratio:.2f} times flash's time"
        return False, source, f"canary: right, and {ratio:.2f} times as fast as flash; {passed}"
    return False, source, f"canary: right; {passed}"


def compiling(desk: Desk) -> Choice:
    c = desk.config
    if c.enable_torch_compile is not None:
        return desk.as_given("enable_torch_compile", "one decoder layer at a time" if c.enable_torch_compile else "")
    if backend.uses_unsloth(desk):
        return Choice("enable_torch_compile", False, "auto", "Unsloth compiles what it wants by itself")
    return Choice("enable_torch_compile", desk.stage.enable_torch_compile, f"stage {c.stage}", "")
