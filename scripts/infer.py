"""infer.py: talk to a trained model, ask it once, or let it answer a file of questions.

python scripts/infer.py --lora_weights=RUN                                                   # a conversation; /help says how to steer it
python scripts/infer.py --lora_weights=RUN --prompt="What is a magnitude?"                   # one answer
python scripts/infer.py --lora_weights=RUN --input_file=asked.jsonl --output_file=said.jsonl # a file; run it again to go on after a stop
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from surefoot import script  # noqa: E402
from surefoot.errors import DataError, UsageError, joined  # noqa: E402
from surefoot.script import flag  # noqa: E402

USAGE = f"""\
{__doc__}
Prompts are those of the run's own training (run.json). A model trained on single questions gets each question alone; one trained on
conversations gets the conversation so far. DoRA's factor is computed once, at the start (surefoot/ops/served.py).
--input_file: rows with prompt, instruction (and input), user (and system), messages, or input alone (a whole prompt, as
render_template.py writes it); json, jsonl, csv or parquet. Each line of --output_file has the row's place, the output, its tokens, and
whether it ended (end) or met --max_new_tokens (length).
Exit codes: 0 done; 2 usage; 3 rows that cannot be read; 5 a model or a library refused."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    lora_weights: str | None = flag(None, "the trained adapter: a run folder, a checkpoint, or any PEFT adapter; or a merged model")
    base_model: str | None = flag(None, "folder or Hub id; default: the run's own. Alone: this model answers")
    config: str | None = flag(None, "a run file of finetune.py: its output_dir is --lora_weights, its gen: group the settings below")
    weights: str = flag(
        "adapter", "adapter beside the base, merged into it in memory, or the base alone", choices=("adapter", "merged", "base")
    )
    mode: str | None = flag(None, "default: batch with --input_file, else interactive", choices=("interactive", "batch"))
    prompt: str | None = flag(None, "one question; its answer goes to stdout")
    input_file: str | None = flag(None, "a file of questions")
    output_file: str | None = flag(None, "where the answers go, a line each (.jsonl)")
    system: str = flag("auto", "the system turn, where the prompt style has one; auto: the one that all training rows had, if they had one")
    max_new_tokens: int | None = flag(None, "tokens generated at most; default 256", low=1)
    temperature: float | None = flag(None, "0 (the default) takes the likeliest token each time", low=0.0)
    top_p: float | None = flag(None, "sample among the likeliest tokens of this much probability; default 1", low=0.0)
    seed: int = flag(42, "of the sampling", low=0)
    batch_size: int = flag(16, "rows at a time, with --input_file", low=1)
    dtype: str = flag("auto", "of weights and activations; auto: bf16 on a GPU, fp32 on a CPU", choices=("auto", "bf16", "fp16", "fp32"))
    load_8bit: bool = flag(False, "the base in int8; default: as the run had it")
    load_4bit: bool = flag(False, "the base in NF4; default: as the run had it")
    prompt_style: str | None = flag(None, "default: the run's own")


def run(flags: Flags) -> None:
    """Opens the model and answers.

    Raises:
        SurefootError: a flag, a file or a model that cannot be used.
    """
    _check(flags)
    source = _source(flags)
    from surefoot.data import asked

    job = asked.read_job(flags.input_file, flags.output_file) if flags.input_file and flags.output_file else None
    from surefoot import answering, inference  # torch: after flags and rows are known to be good

    sampling = _sampling(flags)
    opened = inference.open_model(source, dtype=flags.dtype, merges=flags.weights == "merged")
    what = {"adapter": "the adapter beside its base", "merged": "the adapter merged into its base", "base": "the base alone"}[flags.weights]
    what = what if source.adapter else "the model"
    print(f"{source.name()}: {what}, {opened.dtype} on {opened.model.device}, prompt style {opened.prompts.style}", file=sys.stderr)
    from surefoot.ops.served import adapters_off

    with adapters_off(opened.model) if flags.weights == "base" else nullcontext():
        if job is not None:
            _batch(flags, opened, sampling, job)
        elif flags.prompt is not None:
            print(answering.Talk(opened, sampling, flags.system, flags.seed).answer(flags.prompt))
        else:
            _interactive(flags, opened, sampling)


def _check(flags: Flags) -> None:
    """Raises UsageError: flags that do not go together."""
    problems = []
    if bool(flags.input_file) != bool(flags.output_file):
        problems.append("--input_file and --output_file belong together: give both")
    if flags.mode == "batch" and not flags.input_file:
        problems.append("--mode=batch needs --input_file and --output_file")
    if flags.prompt is not None and (flags.input_file or flags.mode == "batch"):
        problems.append("--prompt is one question, --input_file a file of them: give one of the two")
    if flags.mode == "interactive" and flags.input_file:
        problems.append("--mode=interactive reads no --input_file: leave one of the two out")
    if flags.output_file and Path(flags.output_file).suffix != ".jsonl":
        problems.append(f"--output_file={flags.output_file} must end in .jsonl")
    if problems:
        raise UsageError(joined(problems))


def _source(flags: Flags) -> Any:
    from surefoot import inference

    source = inference.find_asked(flags)
    if flags.weights != "adapter" and source.adapter is None:
        raise UsageError(f"--weights={flags.weights}: {source.name()} is a whole model, not an adapter. Leave --weights out")
    return source


def _sampling(flags: Flags) -> Any:
    """The flags, else the run file's gen: group, else the defaults."""
    from surefoot import run_file
    from surefoot.generate import Sampling

    defaults = {"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0}
    group = run_file.generation(flags.config) if flags.config else {}
    in_file = script.parse(Flags, [f"--{name}={value}" for name, value in group.items() if name in defaults])
    asked = {name: getattr(flags, name) if getattr(flags, name) is not None else getattr(in_file, name) for name in defaults}
    values: dict[str, Any] = {name: value if value is not None else defaults[name] for name, value in asked.items()}
    if not 0 < values["top_p"] <= 1:
        raise UsageError(f"--top_p={values['top_p']:g} must be above 0 and at most 1")
    return Sampling(**values)


def _batch(flags: Flags, opened: Any, sampling: Any, job: Any) -> None:
    from surefoot import answering

    began, done, tokens = time.monotonic(), 0, 0
    system = answering.system_of(opened, flags.system)
    settings = {"weights": flags.weights, "system": system, "seed": flags.seed, "batch_size": flags.batch_size}
    remaining = answering.start(job, opened, sampling, settings)
    if remaining == 0:
        print(f"all {len(job.rows):,} rows are answered already: {job.out}. Remove it to have them answered anew")
        return
    if remaining < len(job.rows):
        print(f"{len(job.rows) - remaining:,} of {len(job.rows):,} rows are already in {job.out}; going on", file=sys.stderr)
    with script.progress(remaining, "answering") as tick:
        for rows, made in answering.answer_file(job, opened, sampling, settings):
            tick(rows)
            done, tokens = done + rows, tokens + made
    seconds = time.monotonic() - began
    print(f"{done:,} rows answered, {tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s): {job.out}")


def _interactive(flags: Flags, opened: Any, sampling: Any) -> None:
    from surefoot import answering

    talk = answering.Talk(opened, sampling, flags.system, flags.seed)
    system = f"; system turn: {talk.system}" if talk.system else ""
    print(f"{talk.manner}{system}\n{answering.HELP}", file=sys.stderr)
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() in ("/exit", "/quit"):
            return
        try:
            reply = talk.command(line) if line.startswith("/") else talk.answer(line, streams=True) if line.strip() else None
        except KeyboardInterrupt:
            line, reply = "/", "(stopped)"
        except DataError as error:
            line, reply = "/", f"({error})"
        if reply is not None and line.startswith("/"):
            print(reply)


if __name__ == "__main__":
    sys.exit(script.main(Flags, USAGE, run))
