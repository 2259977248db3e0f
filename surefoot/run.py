"""The story of a run: probe, plan, apply, load, data, train, save."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from surefoot import inputs, machine, plan_text, runtime, verdicts
from surefoot.config import Config
from surefoot.plan import Plan, attention_to_check, make_plan
from surefoot.report import page


def run(config: Config) -> Path:
    """Carries the config out and returns the run folder, which then holds the adapter, the tokenizer and the records.

    Raises:
        SurefootError: the one message for the user; its subclass carries the exit code.
    """
    if config.debug:
        runtime.debug_switches()
    here = machine.probe()
    found = inputs.inspect(config)
    if here.gpus and not config.dry_run:
        found = inputs.with_hub_config(found, config.revision)
    say = partial(print, flush=True) if here.is_main else _silent
    shape = attention_to_check(config, here, found)
    checked = None if shape is None else verdicts.known(here, shape) if config.dry_run else verdicts.ask(here, shape, say=say)
    plan = make_plan(config, here, found, checked)
    say(plan_text.as_json(plan) if config.plan_json else plan_text.table(plan, all_rows=config.dry_run))
    if not config.dry_run:
        with page.kept(plan.output.folder, is_main=here.is_main):
            carry_out(plan, say=say)
    return Path(plan.output.folder)


def carry_out(plan: Plan, *, say: Any) -> None:
    """Everything that needs torch, in order. The run folder is touched only once rows and model are good."""
    from surefoot import adapters, artifacts, tokens, weights
    from surefoot.backends import hf
    from surefoot.data import audit, packing, prepare, rows
    from surefoot.ops import head
    from surefoot.ops.fuse import fuse
    from surefoot.training import trainer

    runtime.apply(plan.process)
    tokenizer = hf.load_tokenizer(plan.model)
    pad = tokens.settle(tokenizer)
    say(f"PAD: {pad.token} (id {pad.token_id}), {pad.reason}")
    try:
        data = prepare.prepare(plan.data, tokenizer, shows_progress=plan.machine.is_main)
    except audit.AuditError as refused:
        if vacant := artifacts.vacant(plan):
            audit.write_audit(refused.audit, vacant)
            say(f"audit: every row's fate is in {vacant / 'audit.json'}")
        raise
    plan, data = packing.settle(plan, data)
    say("\n".join(data.report.lines()))
    model = hf.load_model(plan.model, len(tokenizer), plan.adapter.target_modules)
    zero_rows = weights.zero_rows(model, plan.adapter.target_modules)
    if zero_rows:
        say(weights.describe(zero_rows, plan.adapter.method))
    if data.packed is not None and plan.train.packed_attention == "varlen":
        from surefoot.attention import packed

        packed.use_varlen(model)
    model = adapters.attach(model, plan.adapter, plan.process.seed)
    say(adapters.describe(model))
    if plan.model.fused_adapters:
        say(fuse(model).line())
    collator: Any = packing.collator(data, rows.Collator(pad_token_id=pad.token_id))
    if plan.model.fused_loss:
        head.use_head_loss(model, compiled=plan.model.enable_torch_compile)
        collator = head.WithPositions(collator)
    if plan.model.enable_torch_compile:
        say(f"torch.compile: {adapters.compile_layers(model)} decoder layers, compiled at their first step")
    with artifacts.opened(plan) as folder:
        folder.note(pad=pad._asdict(), zero_rows=zero_rows)
        folder.note_data(data.report.as_record())
        if folder.is_main:
            audit.write_audit(data.audit, folder.path)
        summary = trainer.train(plan, model, tokenizer, data, collator)
        folder.check_saved()
        folder.note(summary=summary)
    say(trainer.summary_line(summary, plan.output.folder))


def _silent(text: str) -> None:
    """What the other ranks say."""
