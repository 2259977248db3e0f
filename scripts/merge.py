"""merge.py: merges an adapter into its base model, and proves that the result says the same.

python scripts/merge.py --adapter RUN [--out FOLDER] [--dtype bf16|fp16|fp32] [--onto seen|16bit]
python scripts/merge.py --verify FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.errors import UsageError  # noqa: E402
from surefoot.script import flag  # noqa: E402

USAGE = f"""\
{__doc__}
Memory is one shard, the adapter and a few matrices (not the model); parity loads base and merged model in fp32, one after the other.
Exit codes: 0 done; 2 a flag or folder; 4 not finite, or beyond the parity band (the result is then in OUT.refused); 5 the model or disk."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    adapter: str = flag("", "a run folder of finetune.py, one of its checkpoint-N, or a PEFT LoRA or DoRA folder")
    adapters: str = flag("", "the older name of --adapter")
    config: str = flag("", "or the run file that the run was started with: its output_dir is the adapter")
    out: str = flag("", "where the model goes; default: ADAPTER/merged-DTYPE. It appears whole or not at all")
    dtype: str = flag("bf16", "of the merged weights; the merge itself is computed in fp32", choices=("fp16", "bf16", "fp32"))
    onto: str = flag(
        "seen",
        "the base to merge into. seen: as the adapter saw it, so a QLoRA base is quantized and dequantized first. 16bit: the "
        "unquantized base, which is another model than was trained. nf4, int8: what an adapter of another program, without "
        "backend.json, was trained on",
    )
    base_model: str = flag("", "where the base lies on this machine, if not where the run found it")
    overwrite: bool = flag(False, "replace an earlier export in --out")
    parity: bool = flag(True, "compare adapter and merged model in fp32 on 32 prompts and write parity.json; False: write unchecked")
    prompts: str = flag("", "a file of other prompts for that, one a line")
    shard_gib: float = flag(4.0, "the most that one file of weights holds", low=0.001)
    verify: str = flag("", "the folder of an earlier merge, to judge it again, against its adapter")


def run(flags: Flags) -> None:
    """Merges, or verifies an earlier merge."""
    from surefoot.export import place, prompts, source

    say = partial(print, flush=True)
    if flags.verify:
        from surefoot.export import story

        story.verify(flags.verify, flags.prompts, say)
        return
    folder = flags.adapter or flags.adapters or _output_dir(flags.config)
    found = source.read(folder, flags.base_model, flags.onto)
    where = Path(flags.out or f"{folder.rstrip('/')}/merged-{flags.dtype}")
    place.check(where, overwrites=flags.overwrite)
    prompts.load(flags.prompts)
    from surefoot.export import story  # torch: after the flags are known to be good

    job = story.Job(where, flags.dtype, flags.overwrite, flags.parity, flags.prompts, int(flags.shard_gib * 2**30))
    story.merge_adapter(found, job, say)


def _output_dir(config: str) -> str:
    from surefoot import run_file

    if not config:
        raise UsageError("give --adapter, a run folder of finetune.py")
    folder = run_file.read(config).get("output_dir")
    if not folder:
        raise UsageError(f"--config={config} names no output_dir: give --adapter")
    return str(folder)


if __name__ == "__main__":
    sys.exit(script.main(Flags, USAGE, run))
