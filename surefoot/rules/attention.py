"""Attention, its kernels, compile and recompute: what the stage sets and single flags override."""

from __future__ import annotations

from collections.abc import Iterator

from surefoot.rules.desk import Choice, Desk


def attention(desk: Desk) -> Choice:
    c, m = desk.config, desk.machine
    fallback = None
    if not m.gpus:
        fallback = "needs a CUDA GPU"
    elif not m.has("flash-attn"):
        fallback = "is not installed (pip install flash-attn --no-build-isolation)"
    if c.attn_implementation is not None:
        if c.attn_implementation == "flash_attention_2" and fallback:
            desk.problems.append(f"--attn_implementation=flash_attention_2 {fallback}. Use --attn_implementation=sdpa, or eager")
        return desk.as_given("attn_implementation")
    wanted = desk.stage.attn_implementation
    if wanted == "flash_attention_2" and fallback:
        return Choice("attn_implementation", "sdpa", f"stage {c.stage}", f"flash_attention_2 {fallback}")
    return Choice("attn_implementation", wanted, f"stage {c.stage}", "")


def sdpa(desk: Desk, attention: str) -> Iterator[Choice]:
    c = desk.config
    has_effect = attention == "sdpa" and bool(desk.machine.gpus)
    idle = "" if has_effect else "no effect: only sdpa attention on a GPU reads it"
    given = c.disable_cudnn_sdpa
    off = desk.stage.disable_cudnn_sdpa if given is None else given
    source = c.source("disable_cudnn_sdpa") if given is not None else f"stage {c.stage}"
    if has_effect and not off:
        desk.notes.append(
            "cuDNN attention is on and nothing has checked it on this machine: with torch 2.11 to 2.14 its gradients are NaN "
            "for some lengths when a mask is passed (pytorch/pytorch#196678)"
        )
    reason = "" if given is not None else "until a check of this machine clears cuDNN's kernels"
    yield Choice("disable_cudnn_sdpa", off, source, idle or reason)
    yield Choice("disable_flash_sdpa", c.disable_flash_sdpa, c.source("disable_flash_sdpa"), idle)


def compiling(desk: Desk) -> Choice:
    c = desk.config
    if c.enable_torch_compile is not None:
        return desk.as_given("enable_torch_compile", "one decoder layer at a time" if c.enable_torch_compile else "")
    return Choice("enable_torch_compile", desk.stage.enable_torch_compile, f"stage {c.stage}", "")


def checkpointing(desk: Desk) -> Choice:
    asked = desk.config.use_gradient_checkpointing
    reason = "unsloth's recompute needs the unsloth backend; the plain one is used" if asked == "unsloth" else ""
    return Choice("use_gradient_checkpointing", bool(asked), desk.config.source("use_gradient_checkpointing"), reason)
