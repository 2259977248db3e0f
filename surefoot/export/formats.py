"""A model folder in another form: 4-bit bitsandbytes, or GGUF; judged against the adapter it comes from, else against itself."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from surefoot import runtime
from surefoot.artifacts import META, PROMPT
from surefoot.errors import BackendError, UsageError
from surefoot.export import GGUF, carry, gguf_vocab, judge, merge, place, prompts, records, serving, shards, source, story
from surefoot.export.judge import Subject, Verdict
from surefoot.export.source import Source
from surefoot.json_file import read_json
from surefoot.script import told

Say = Callable[[str], object]
BAND_OF = {"bnb-4bit": "nf4", "gguf-f32": "fp32", "gguf-f16": "fp16", "gguf-bf16": "bf16", "gguf-q8_0": "q8_0"}
BYTES = {"bnb-4bit": 0.5, "gguf-f32": 4, "gguf-f16": 2, "gguf-bf16": 2, "gguf-q8_0": 34 / 32}  # a weight's; the least, for bnb-4bit


class Job(NamedTuple):
    """What the user asked for. converter is the path of llama.cpp's convert_hf_to_gguf.py, "" for our own writer."""

    out: Path
    form: str
    overwrites: bool
    checks_parity: bool
    prompt_file: str
    converter: str


def of_adapter(found: Source, job: Job, say: Say) -> None:
    """Merges into a folder that is removed afterwards, in fp32 where the form rounds once more, and exports that.

    Raises:
        NumericsError: beyond the parity band.
    """
    place.check(job.out, overwrites=job.overwrites)
    runtime.quiet()
    _check(job, found.base, found.base_config, found.tokenizer)
    dtype = "bf16" if job.form in ("bnb-4bit", "gguf-bf16") else "fp32"
    work = merge.prepare(found, dtype)
    weight = merge.DTYPES[dtype].itemsize
    place.check_room(job.out, sum(output.size * (1 + BYTES[job.form] / weight) for output in merge.outputs(work)))
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{job.out.name}.", suffix=".merged", dir=job.out.parent) as folder:
        merged = Path(folder)
        total = len(merge.outputs(work))
        for _ in told(merge.write(work, merged, shard_bytes=4 << 30), total, "merged", "tensor"):
            pass
        for note in merge.finish(work, merged).notes:
            say(f"note: {note}")
        say(f"merged {found.method} into {found.base_name}, {story.named(found.onto)}")
        _export(merged, found, found.record, job, say)


def of_model(folder: Path, job: Job, say: Say) -> None:
    """Exports a merged or fully trained model; the reference is the adapter that its surefoot_meta.json names, if it is still there.

    Raises:
        UsageError: no such model. NumericsError: beyond the parity band.
    """
    source.check_model(folder)
    place.check(job.out, overwrites=job.overwrites)
    runtime.quiet()
    _check(job, folder, read_json(folder / "config.json"), folder)
    place.check_room(job.out, sum(math.prod(stored.shape) * BYTES[job.form] for stored in shards.stored(folder).values()))
    meta = read_json(folder / META)
    try:
        found = story.from_meta(meta) if "adapter" in meta else None
    except UsageError as gone:
        say(f"note: parity is measured against {folder}: {gone}")
        found = None
    _export(folder, found, meta.get("run") or read_json(folder / "run.json"), job, say)


def _check(job: Job, folder: Path, config: dict[str, Any], tokenizer: Path) -> None:
    """All that can be refused before the merge, which takes minutes and gigabytes."""
    prompts.load(job.prompt_file)
    if job.form == "bnb-4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise BackendError("--format=bnb-4bit needs bitsandbytes, which is not installed: pip install 'surefoot[bnb]'")
    if job.form in GGUF and not job.converter:
        from surefoot.export import gguf_file

        gguf_file.check(folder, config)
        gguf_file.tensors(folder, config, job.form)
        gguf_vocab.check(tokenizer)


def _export(folder: Path, found: Source | None, record: dict[str, Any], job: Job, say: Say) -> None:
    """Writes `folder`, a model in transformers' form that the run of `record` made, to job.out."""
    trusts = found.trusts_remote_code if found else False
    with place.staged(job.out) as staged:
        if job.form == "bnb-4bit":
            file = None
            _to_4bit(folder, staged, trusts_remote_code=trusts)
            carry.copied((*carry.TOKENIZER, *carry.OF_BASE, PROMPT), folder, staged)
        else:
            file = f"{job.out.name}.{job.form.removeprefix('gguf-').upper()}.gguf"
            _to_gguf(folder, staged / file, job)
        size = sum(part.stat().st_size for part in staged.iterdir() if part.is_file())
        say(f"wrote {job.form}, {size / 2**20:,.0f} MiB")
        verdict = _verdict(folder, found, Subject(staged, BAND_OF[job.form], file, folder, trusts), job) if job.checks_parity else None
        origin = records.of_source(found) if found else {"model": {"path": str(folder.resolve())}, **records.of_run(record)}
        records.write(staged, verdict, format=job.form, **origin)
        serving.write(staged, job.out, record, say, gguf=file, tokenizer_folder=folder)
        story.settle(staged, job.out, verdict, say)
    say(f"done: {job.out}")


def _verdict(folder: Path, found: Source | None, subject: Subject, job: Job) -> Verdict:
    if found is not None:
        return judge.of_adapter(found, subject, job.prompt_file)
    return judge.of_model(folder, subject, job.prompt_file)


def _to_gguf(folder: Path, file: Path, job: Job) -> None:
    from surefoot.export import gguf_file

    if job.converter:
        gguf_file.convert(job.converter, folder, file, job.form)
        return
    for _ in told(gguf_file.write(folder, file, job.form), len(shards.stored(folder)), "written to the GGUF", "tensor"):
        pass


def _to_4bit(folder: Path, out: Path, *, trusts_remote_code: bool) -> None:
    """The model as bitsandbytes' NF4 with double quantization, as training loads a base."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    where = {"": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=asked, dtype=torch.bfloat16, device_map=where, trust_remote_code=trusts_remote_code
        )
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        raise BackendError(f"bitsandbytes cannot quantize {folder}: {str(error).strip().splitlines()[0]}") from None
    model.save_pretrained(out)
