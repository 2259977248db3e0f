"""How the base model is loaded and what is trained: quantization, precision, adapter."""

from __future__ import annotations

from collections.abc import Iterator

from surefoot.machine import Gpu
from surefoot.rules.desk import Choice, Desk

ALPHA_RULES = {"r": 1, "2r": 2}


def revision(desk: Desk) -> Choice:
    """The commit that is trained, so that a resumed run and whoever loads the adapter take the same one."""
    commit = desk.inputs.commit
    if commit is None or desk.config.revision == commit:
        return desk.as_given("revision")
    return Choice("revision", commit, desk.config.source("revision"), f"what {desk.config.revision or 'the main branch'} is now")


def quantization(desk: Desk) -> Choice:
    c, m = desk.config, desk.machine
    kind = "nf4" if c.load_4bit else "int8" if c.load_8bit else "none"
    flag = "load_4bit" if c.load_4bit else "load_8bit"
    if c.load_4bit and c.load_8bit:
        desk.problems.append("--load_4bit=True and --load_8bit=True exclude each other. Give one of them")
    elif kind != "none" and not m.has("bitsandbytes"):
        desk.problems.append(f"--{flag}=True needs bitsandbytes, which is not installed: pip install 'surefoot[bnb]'")
    reason = "NF4, double quantization" if kind == "nf4" else "frozen weights keep their precision" if kind == "none" else ""
    return Choice("quantization", kind, c.source(flag) if kind != "none" else "default", reason)


def precision(desk: Desk) -> Choice:
    c, m = desk.config, desk.machine
    if c.bf16 and c.fp16:
        desk.problems.append("--bf16=True and --fp16=True exclude each other. Give one of them, or neither to have it chosen")
    if c.fp16 and not m.gpus:
        desk.problems.append("--fp16=True has no effect on a CPU: the libraries ignore it silently. Use --bf16=True, or neither for fp32")
    if c.bf16 and m.gpu and m.gpu.capability < (8, 0):
        desk.problems.append(f"--bf16=True needs compute capability 8.0; {m.gpu.name} has {_version(m.gpu)}. Use --fp16=True")
    asked = "bf16" if c.bf16 else "fp16" if c.fp16 else "fp32" if c.bf16 is False or c.fp16 is False else None
    casts = m.engine in ("deepspeed", "fsdp")  # of those launch.profile_and_flags refuses any precision in the profile
    if m.launcher_precision in ("bf16", "fp16") and asked not in (None, m.launcher_precision) and not casts:
        desk.problems.append(
            f"the launcher's profile says mixed_precision: {m.launcher_precision}, the flags say {asked}. "
            "Change one of them, or set mixed_precision: 'no' in the profile and let the flags decide"
        )
    if (c.bf16 is False and c.fp16 is None) or (c.fp16 is False and c.bf16 is None):
        return Choice("precision", "fp32", c.source("bf16" if c.bf16 is False else "fp16"), "autocast switched off")
    if asked:
        return Choice("precision", asked, c.source("bf16" if c.bf16 else "fp16"), "autocast over fp32 master weights")
    if m.launcher_precision in ("bf16", "fp16"):
        return Choice("precision", m.launcher_precision, "profile", "mixed_precision of the launcher's profile")
    if m.gpu is None:
        return Choice("precision", "fp32", "auto", "no GPU")
    if m.gpu.capability >= (8, 0):
        return Choice("precision", "bf16", "auto", f"{m.gpu.name} has bf16 (compute capability {_version(m.gpu)})")
    return Choice("precision", "fp16", "auto", f"{m.gpu.name} has no bf16 (compute capability {_version(m.gpu)} < 8.0)")


def compute_dtype(desk: Desk, backend: str, quantization: str, precision: str) -> Choice:
    if quantization == "none" or backend == "unsloth":
        return Choice("compute_dtype", precision, "auto", "as precision")
    if precision == "fp16" or (precision == "fp32" and desk.config.given("bf16")):
        return Choice("compute_dtype", precision, "auto", "as precision")
    return Choice("compute_dtype", "bf16", "auto", "products of quantized weights")


def method(desk: Desk, backend: str) -> Iterator[Choice]:
    c = desk.config
    source = c.source("adapter_name")
    method = "lora" if c.adapter_name == "rslora" else c.adapter_name
    is_rslora = c.use_rslora or c.adapter_name == "rslora"
    if method == "full":
        named = [name for name in ("lora_r", "lora_alpha", "target_modules", "init_lora_weights", "use_rslora") if c.given(name)]
        if named:
            desk.notes.append(f"--adapter_name=full trains every weight: --{', --'.join(named)} have no effect")
    if c.lora_dropout >= 1:
        desk.problems.append(f"--lora_dropout={c.lora_dropout:g} must be below 1")
    yield Choice("method", method, source, "")
    yield _dropout(desk, backend, method)
    alpha = float(c.lora_alpha) if not isinstance(c.lora_alpha, str) else float(c.lora_r * ALPHA_RULES[c.lora_alpha])
    yield Choice("lora_alpha", alpha, c.source("lora_alpha"), f"{c.lora_alpha} of r = {c.lora_r}" if alpha != c.lora_alpha else "")
    root = "alpha / sqrt(r)" if is_rslora else "alpha / r"
    scale = alpha / (c.lora_r**0.5 if is_rslora else c.lora_r)
    yield Choice("use_rslora", is_rslora, c.source("use_rslora") if c.use_rslora else source, f"scale {root} = {scale:g}")


def _dropout(desk: Desk, backend: str, method: str) -> Choice:
    c = desk.config
    if backend == "unsloth" and not c.given("lora_dropout"):
        return Choice("lora_dropout", 0.0, "auto", "Unsloth's LoRA kernels have none")
    if method == "dora" and c.lora_dropout > 0:
        desk.notes.append(f"DoRA with lora_dropout={c.lora_dropout:g} computes each base product twice; --lora_dropout=0 is faster")
    is_slow = backend == "unsloth" and c.lora_dropout > 0
    return desk.as_given("lora_dropout", "Unsloth's LoRA kernels may be off: they were made for 0" if is_slow else "")


def initial_weights(desk: Desk, quantization: str) -> Choice:
    c = desk.config
    init = c.init_lora_weights
    kind = init if isinstance(init, str) else ""
    if kind == "eva":
        desk.problems.append(
            "--init_lora_weights=eva takes its directions from training rows before the run, which is not built. Use pissa"
        )
    if kind == "loftq" and quantization != "nf4":
        desk.problems.append("--init_lora_weights=loftq makes up for what 4-bit weights lose. Add --load_4bit=True, or drop it")
    if kind.startswith(("pissa", "olora")) and quantization != "none":
        desk.problems.append(
            f"--init_lora_weights={init} splits the base weights and needs the unquantized weights. Drop --load_4bit/--load_8bit"
        )
    return desk.as_given("init_lora_weights")


def targets(desk: Desk) -> Choice:
    if desk.config.target_modules:
        return desk.as_given("target_modules")
    return Choice("target_modules", None, "auto", "every linear layer but the head")


def _version(gpu: Gpu) -> str:
    return ".".join(str(part) for part in gpu.capability)
