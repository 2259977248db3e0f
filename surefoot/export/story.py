"""The merge from the adapter's folder to a judged model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from surefoot import checkpoint, runtime
from surefoot.artifacts import META
from surefoot.errors import NumericsError, UsageError
from surefoot.export import judge, merge, place, prompts, records, serving, source
from surefoot.export.judge import Subject, Verdict
from surefoot.export.source import Source
from surefoot.json_file import read_json, write_json
from surefoot.script import told

Say = Callable[[str], object]


class Job(NamedTuple):
    """What the user asked for. shard_bytes is the most that a file of weights, and so the memory, holds."""

    out: Path
    dtype: str
    overwrites: bool
    checks_parity: bool
    prompt_file: str
    shard_bytes: int


def merge_adapter(found: Source, job: Job, say: Say) -> None:
    """Writes the merged model to job.out, with its records and its verdict.

    Raises:
        NumericsError: beyond the parity band; what was written is then kept beside, with `.refused` at the end of its name.
    """
    place.check(job.out, overwrites=job.overwrites)
    prompts.load(job.prompt_file)
    runtime.quiet()
    work = merge.prepare(found, job.dtype)
    place.check_room(job.out, sum(output.size for output in merge.outputs(work)))
    say(f"merging {found.method} ({len(work.adapter.layers)} layers) into {found.base_name}, {named(found.onto)}, as {job.dtype}")
    with place.staged(job.out) as folder:
        written = list(told(merge.write(work, folder, shard_bytes=job.shard_bytes), len(merge.outputs(work)), "merged", "tensor"))
        done = merge.finish(work, folder)
        say(f"wrote {len(written)} tensors, {done.merged} of them merged, {sum(output.size for output in written) / 2**20:,.0f} MiB")
        for note in done.notes:
            say(f"note: {note}")
        del work
        verdict = None
        if job.checks_parity:
            subject = Subject(folder, job.dtype, trusts_remote_code=found.trusts_remote_code)
            verdict = judge.of_adapter(found, subject, job.prompt_file)
        records.write(folder, verdict, format=job.dtype, **records.of_source(found), notes=list(done.notes))
        serving.write(folder, job.out, found.record, say)
        settle(folder, job.out, verdict, say)
    say(f"done: {job.out}")


def named(quantization: str) -> str:
    return "unquantized" if quantization == "none" else f"dequantized from the {quantization} that the adapter saw"


def settle(folder: Path, out: Path, verdict: Verdict | None, say: Say) -> None:
    """Says the verdict; what does not hold is put beside `out` and refused."""
    if verdict is None:
        say("parity: not checked (--parity=False)")
        return
    say(verdict.line)
    if not verdict.holds:
        kept = place.put_aside(folder, out)
        raise NumericsError(
            f"the export is not what was trained: {'; '.join(verdict.reasons)}. It is kept in {kept} for a look; do not serve it"
        )
    band = verdict.record["band"]
    say(f"parity holds: within {band['logits']:g} of the largest logit and KL {band['kl']:g}; chat template and special tokens are equal")


def verify(model: str, prompt_file: str, say: Say) -> None:
    """Judges a merged folder again, against the adapter that its surefoot_meta.json names.

    Raises:
        UsageError: the adapter is gone or another by now. NumericsError: beyond the band.
    """
    folder = Path(model)
    meta = read_json(folder / META)
    if "adapter" not in meta or meta.get("format") not in merge.DTYPES:
        raise UsageError(f"--verify={model} is no folder that this script merged (by its {META}): other exports are judged once")
    runtime.quiet()
    found = from_meta(meta)
    verdict = judge.of_adapter(found, Subject(folder, meta["format"], trusts_remote_code=found.trusts_remote_code), prompt_file)
    write_json(folder / records.PARITY, verdict.record)
    say(verdict.line)
    if not verdict.holds:
        raise NumericsError(f"{folder} is not what was trained: {'; '.join(verdict.reasons)}. Merge again")
    say("parity holds")


def from_meta(meta: dict[str, dict[str, str]]) -> Source:
    """The source that an export's surefoot_meta.json names, as long as its adapter is still the same.

    Raises:
        UsageError: the adapter is gone or another by now.
    """
    adapter, base = meta["adapter"], meta["base"]
    file = Path(adapter["path"]) / "adapter_model.safetensors"
    if not file.is_file() or records.sha256(file) != adapter["sha256"]:
        state = "is another by now" if file.is_file() else "is not there any more"
        raise UsageError(f"the adapter that this model was merged from, {adapter['path']}, {state}: merge again")
    onto = "seen" if base["merged_onto"] == base["seen"] else "16bit"
    has_stamp = (checkpoint.home(file.parent) / "backend.json").is_file()
    if not has_stamp and base["seen"] != "none":
        onto = base["seen"] if onto == "seen" else onto
    return source.read(adapter["path"], "" if Path(base["name"]).is_dir() else base["path"], onto)
