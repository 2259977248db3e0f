"""Who loads and attaches: transformers (hf), bitsandbytes on it (bnb), or Unsloth; what must be asked first, and what a fallback says."""

from __future__ import annotations

import dataclasses

from surefoot.detection import Case
from surefoot.rules import model, speeds
from surefoot.rules.desk import Choice, Desk
from surefoot.rules.speeds import Speed

INSTALL = "Install Unsloth with: pip install 'surefoot[unsloth]'"
FALLBACKS = {"hf": "transformers", "bnb": "BitsAndBytes"}
READ_BY_NOTHING = ("XFORMERS_DISABLED", "UNSLOTH_DISABLE_FAST_ATTENTION", "UNSLOTH_FORCE_SDPA")  # older guides set them
INITS = (True, False, "gaussian", "orthogonal", "loftq")  # which are drawn here, whoever attached the adapter


def backend(desk: Desk, quantization: str) -> Choice:
    """hf, bnb or unsloth. What keeps an asked-for backend from running is left on the desk for --strict_backend."""
    c = desk.config
    fallback = "hf" if quantization == "none" else "bnb"
    why = "frozen weights are not quantized" if fallback == "hf" else "quantized weights are bitsandbytes'"
    if c.backend == "unsloth":
        desk.problems += [f"--backend=unsloth {conflict}" for conflict in conflicts(desk)]
        desk.obstacle = obstacle(desk)
        if desk.obstacle:
            text = f"{desk.obstacle}. Falling back to {FALLBACKS[fallback]} backend"
            desk.notes.append(text)
            return Choice("backend", fallback, "auto", f"{text} ({why})")
        _explain_switches(desk)
        return Choice("backend", "unsloth", c.source("backend"), _tested(desk))
    if c.backend == "auto":
        measured = compared(desk)
        if uses_unsloth(desk):
            return Choice("backend", "unsloth", "auto", f"{_figures(measured)}; {_tested(desk)}")
        return Choice("backend", fallback, "auto", why + (f"; {_figures(measured)}" if measured else ""))
    if c.backend != fallback:
        cure = "give --load_4bit=True" if fallback == "hf" else "drop --load_4bit and --load_8bit"
        desk.obstacle = f"{why}: {cure}"
        return Choice("backend", fallback, "auto", f"--backend={c.backend} was asked for, but {why}")
    return Choice("backend", fallback, c.source("backend"), why)


def uses_unsloth(desk: Desk) -> bool:
    """Whether Unsloth is what the run will use: asked for, or measured faster under auto; free of conflicts, and known to work here."""
    if desk.config.backend == "auto":
        measured = compared(desk)
        wanted = measured is not None and measured.unsloth > measured.ours
    else:
        wanted = desk.config.backend == "unsloth"
    return wanted and not conflicts(desk) and not obstacle(desk)


def question(desk: Desk) -> Case | None:
    """What the trial must answer before the plan is made; None where Unsloth is not in question, whatever it would say."""
    scratch = dataclasses.replace(desk, problems=[], notes=[])
    if not uses_unsloth(scratch):
        return None
    found = desk.inputs.model_config or {}
    return Case(
        model_type=str(found.get("model_type", "llama")),
        method=_method(desk),
        quantization=model.quantization(scratch).value,
        dtype=model.precision(scratch).value,
    )


def compared(desk: Desk) -> Speed | None:
    """The figures that auto goes by; None where Unsloth could not run or nobody has measured both."""
    m = desk.machine
    if not m.gpus or not m.has("unsloth") or conflicts(desk) or obstacle(desk):
        return None
    return speeds.find(_method(desk), model.quantization(dataclasses.replace(desk, problems=[], notes=[])).value, desk.speeds)


def conflicts(desk: Desk) -> list[str]:
    """What the flags and the launcher ask for and Unsloth has not, each with its way out."""
    c, m = desk.config, desk.machine
    scratch = dataclasses.replace(desk, problems=[], notes=[])
    precision = model.precision(scratch).value
    instead = "accelerate launch --config_file profiles/ddp.yaml with --backend=auto"
    by_layer = "--use_gradient_checkpointing=unsloth, True or False"
    rules = (
        (m.world_size > 1, f"is one process on one GPU, and this run has {m.world_size} processes. Use {instead}, or --num_processes 1"),
        (m.world_size == 1 and m.engine != "single", f"takes no {m.engine} profile. Use python finetune.py, or {instead}"),
        (c.adapter_name == "full", "attaches LoRA and DoRA: --adapter_name=full trains every weight. Use --backend=hf"),
        (c.load_8bit, "loads 4-bit or 16-bit weights here. Use --load_4bit=True, or --backend=bnb with --load_8bit=True"),
        (c.init_lora_weights not in INITS, f"does not take --init_lora_weights={c.init_lora_weights} here. Use --backend=auto"),
        (c.attn_implementation == "eager", "has no eager attention. Use --attn_implementation=sdpa, or --backend=hf"),
        (c.packing is True, "keeps packed rows apart in its own collator only. Use --packing=False, or --backend=hf"),
        (c.use_gradient_checkpointing == "selective", f"recomputes every layer or none. Use {by_layer}"),
        (c.use_gradient_checkpointing == "offload", "offloads by its own recompute. Use --use_gradient_checkpointing=unsloth"),
        (c.enable_torch_compile is True, "compiles by itself. Drop --enable_torch_compile, or use --backend=hf"),
        (bool(m.gpus) and precision == "fp32", "trains in bf16 or fp16, and the precision is fp32. Use --bf16=True, or --backend=hf"),
        (not m.gpus and precision != "fp32", f"decides alone whether a CPU uses {precision}. Drop --{precision}, or use --backend=hf"),
    )
    return [text for broken, text in rules if broken]


def obstacle(desk: Desk) -> str | None:
    """Why Unsloth cannot run here, None as far as is known."""
    if desk.machine.unsloth_refused:
        return f"Unsloth gave up when the run was first started: {desk.machine.unsloth_refused}"
    answer = desk.unsloth
    if answer is None or answer.works:
        return None if desk.machine.has("unsloth") else f"Unsloth not available (ImportError): No module named 'unsloth'. {INSTALL}"
    if answer.kind == "not installed":
        return f"Unsloth not available ({answer.reason}). {INSTALL}"
    if answer.kind == "attention conflict":
        return (
            f"Unsloth failed to initialize (XFormers or flash-attn conflict): {answer.reason}. Way out: pip uninstall xformers flash-attn"
        )
    return f"Unsloth failed to initialize ({answer.kind}): {answer.reason}"


def _explain_switches(desk: Desk) -> None:
    idle = [switch for switch in desk.machine.unsloth_switches if switch.partition("=")[0] in READ_BY_NOTHING]
    if idle:
        desk.notes.append(
            f"{', '.join(idle)}: read by nothing in Unsloth 2026.10. --attn_implementation=sdpa has that effect, and is the default"
        )


def _method(desk: Desk) -> str:
    return "dora" if desk.config.adapter_name == "dora" else "lora"


def _tested(desk: Desk) -> str:
    if desk.unsloth is None:
        return "Unsloth is installed; a run tries it on a tiny model first"
    return f"Unsloth import successful, and {desk.unsloth.reason} ({desk.unsloth.origin}): Unsloth backend will be used"


def _figures(measured: Speed | None) -> str:
    if measured is None:
        return ""
    return f"{measured.method}: {measured.ours:,} tokens/s with our layers, {measured.unsloth:,} with Unsloth's ({measured.source})"
