"""The story of a run: probe, plan, apply, data, model, train, save."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from surefoot import detection, inputs, machine, plan_text, runtime, signals, verdicts
from surefoot.config import Config
from surefoot.errors import BackendError, UnslothRefusedError
from surefoot.machine import Machine
from surefoot.plan import Plan, attention_to_check, make_plan, unsloth_to_try
from surefoot.report import page
from surefoot.signals import StopRequest


def run(config: Config) -> Path:
    """Carries the config out and returns the run folder, which then holds the adapter, the tokenizer and the records.

    Raises:
        SurefootError: the one message for the user; its subclass carries the exit code.
    """
    if config.debug:
        runtime.debug_switches()
    here = machine.probe()
    say = partial(print, flush=True) if here.is_main else _silent
    with signals.heeded(here.stop_file, watches_launcher=here.world_size > 1) as request:
        plan = decide(config, here, say)
        if plan.output.is_finished:
            say(f"the run in {plan.output.folder} is finished: nothing is left to do")
        elif not config.dry_run:
            with page.kept(plan.output.folder, is_main=here.is_main):
                carry_out(plan, request, say=say, may_start_again=not config.strict_backend)
    return Path(plan.output.folder)


def decide(config: Config, here: Machine, say: Any) -> Plan:
    """The plan, printed. What it must know of Unsloth and of attention kernels is tried first, except under --dry_run."""
    found = inputs.inspect(config)
    if not config.dry_run:
        found = inputs.with_hub_config(found, config.revision)
    case = unsloth_to_try(config, here, found)
    tried = None if case is None else detection.known(here, case) if config.dry_run else detection.ask(here, case, say=say)
    shape = attention_to_check(config, here, found, tried)
    checked = None if shape is None else verdicts.known(here, shape) if config.dry_run else verdicts.ask(here, shape, say=say)
    plan = make_plan(config, here, found, checked, tried)
    say(plan_text.as_json(plan) if config.plan_json else plan_text.table(plan, all_rows=config.dry_run))
    return plan


def carry_out(plan: Plan, request: StopRequest, *, say: Any, may_start_again: bool = True) -> None:
    """Everything that needs torch, in order. The run folder is touched only once rows and model are good."""
    runtime.before_imports(plan)
    backend = _backend(plan.backend)  # first: Unsloth patches transformers, peft and trl as they are imported
    from surefoot import artifacts, assembly, tokens
    from surefoot.data import audit, packing, prepare
    from surefoot.training import trainer

    runtime.apply(plan.process)
    tokenizer = backend.load_tokenizer(plan.model)
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
    try:
        made = assembly.assemble(plan, backend, data, len(tokenizer), pad.token_id, say=say)
    except UnslothRefusedError as refused:
        if may_start_again:
            raise
        raise BackendError(f"--backend=unsloth --strict_backend: {refused.reason}") from refused
    with artifacts.opened(plan, made.kernels) as folder:
        folder.note(pad=pad._asdict(), zero_rows=made.zero_rows)
        folder.note_data(data.report.as_record())
        if folder.is_main:
            audit.write_audit(data.audit, folder.path)
        summary = trainer.train(plan, made.model, tokenizer, data, made.collator, request)
        folder.check_saved()
        folder.note(summary=summary)
    say(trainer.summary_line(summary, plan.output.folder))


def _backend(name: str) -> Any:
    if name == "unsloth":
        from surefoot.backends import unsloth

        return unsloth
    from surefoot.backends import hf

    return hf


def _silent(text: str) -> None:
    """What the other ranks say."""
