"""assemble(): the model of a plan, ready to train: loaded, adapted, fused, compiled."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from surefoot import adapters, loftq, weights
from surefoot.attention import packed
from surefoot.data import packing, rows
from surefoot.ops import head
from surefoot.ops.fuse import fuse, spare_down
from surefoot.plan import Plan


class Assembled(NamedTuple):
    """kernels: what really runs, read off the model; zero_rows: of its weights, by layer."""

    model: Any
    collator: Any
    kernels: list[str]
    zero_rows: dict[str, int]


def assemble(plan: Plan, backend: Any, data: Any, vocabulary_size: int, pad_token_id: int, *, say: Any) -> Assembled:
    """Every step that the plan asks for, each said in a line.

    Args:
        backend: the module of backends/ that loads.
        vocabulary_size: with the tokens that were added.

    Raises:
        UsageError: target_modules names no layer. BackendError: the model cannot be loaded, adapted or compiled so.
    """
    model_plan = plan.model
    model = backend.load_model(model_plan, vocabulary_size, plan.adapter.target_modules)
    zero_rows = weights.zero_rows(model, plan.adapter.target_modules)
    if zero_rows:
        say(weights.describe(zero_rows, plan.adapter.method))
    if data.packed is not None and plan.train.packed_attention == "varlen":
        packed.use_varlen(model)
    model = _adapted(model, plan, backend, say)
    if model_plan.fused_adapters:
        say(fuse(model, in_pieces=plan.machine.cuts_weights).line())
    collator: Any = packing.collator(data, rows.Collator(pad_token_id=pad_token_id))
    if model_plan.fused_loss:
        head.use_head_loss(model, compiled=model_plan.enable_torch_compile)
        collator = head.WithPositions(collator)
    if model_plan.enable_torch_compile:
        count = adapters.compile_layers(model, in_pieces=plan.machine.cuts_weights)
        say(f"torch.compile: {count} decoder layers, compiled at their first step")
    kernels = backend.kernels(model)
    if model_plan.spares_down:
        kernels = [*kernels, f"recompute without down_proj in {spare_down(model, model_plan.recompute_layers)} layers"]
    say(f"active: {'; '.join(kernels)}")
    return Assembled(model, collator, kernels, zero_rows)


def _adapted(model: Any, plan: Plan, backend: Any, say: Any) -> Any:
    by = None
    if plan.backend == "unsloth":
        by = partial(backend.attach, recompute=plan.model.use_gradient_checkpointing, seed=plan.process.seed)
    model = adapters.attach(model, plan.adapter, plan.process.seed, by)
    if plan.adapter.init_lora_weights == "loftq":
        say(f"LoftQ: {loftq.start(model, plan.model.path, plan.model.revision)} layers start from what quantization lost")
        adapters.reset_magnitudes(model)
    say(adapters.describe(model))
    return model
