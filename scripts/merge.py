"""merge.py: merges an adapter into its base model, and proves that the result says the same.

python scripts/merge.py --adapter RUN [--out FOLDER] [--dtype bf16|fp16|fp32] [--onto seen|16bit]
python scripts/merge.py --verify FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot.errors import SurefootError, UsageError  # noqa: E402

HELP = f"""\
{__doc__}
  --adapter=FOLDER    a run folder of finetune.py, one of its checkpoint-N, or a PEFT LoRA or DoRA folder (--adapters is the older name)
  --config=FILE       or the run file that the run was started with: its output_dir is the adapter
  --out=FOLDER        where the model goes (ADAPTER/merged-DTYPE); it appears whole or not at all
  --dtype=bf16        of the merged weights: fp16, bf16 or fp32. The merge itself is computed in fp32
  --onto=seen         the base to merge into. seen: as the adapter saw it, so a QLoRA base is quantized and dequantized first.
                      16bit: the unquantized base, which is another model than was trained. nf4, int8: what an adapter of another
                      program, without backend.json, was trained on
  --base_model=FOLDER where the base lies on this machine, if not where the run found it
  --overwrite         replace an earlier export in --out
  --parity=True       compare adapter and merged model in fp32 on 32 prompts and write parity.json; False: write unchecked
  --prompts=FILE      other prompts for that, one a line
  --shard_gib=4       the most that one file of weights holds; memory is one shard, the adapter and a few matrices (not the model)
  --verify=FOLDER     judge an earlier merge again, against its adapter

Parity loads base and merged model in fp32, one after the other.
Exit codes: 0 done; 2 a flag or folder; 4 not finite, or beyond the parity band (the result is then in OUT.refused); 5 the model or disk."""


def merge(
    adapter: str = "",
    adapters: str = "",
    config: str = "",
    out: str = "",
    dtype: str = "bf16",
    onto: str = "seen",
    base_model: str = "",
    overwrite: bool = False,
    parity: bool = True,
    prompts: str = "",
    shard_gib: float = 4.0,
    verify: str = "",
) -> None:
    """Merges, or verifies an earlier merge."""
    from surefoot.export import source, story

    say = partial(print, flush=True)
    if verify:
        story.verify(verify, prompts, say)
        return
    if dtype not in ("fp16", "bf16", "fp32"):
        raise UsageError(f"--dtype={dtype} must be fp16, bf16 or fp32")
    folder = adapter or adapters or _output_dir(config)
    found = source.read(folder, base_model, onto)
    where = Path(out or f"{folder.rstrip('/')}/merged-{dtype}")
    story.merge_adapter(found, story.Job(where, dtype, overwrite, parity, prompts, int(shard_gib * 2**30)), say)


def _output_dir(config: str) -> str:
    from surefoot import run_file

    if not config:
        raise UsageError("give --adapter, a run folder of finetune.py")
    folder = run_file.read(config).get("output_dir")
    if not folder:
        raise UsageError(f"--config={config} names no output_dir: give --adapter")
    return str(folder)


def main() -> int:
    import fire

    from surefoot.export.words import tidy

    argv = sys.argv[1:]
    if not argv or any(word in ("-h", "--help", "help") for word in argv):
        print(HELP)
        return 0
    try:
        fire.Fire(merge, command=tidy(merge, argv), serialize=lambda _: None)
    except SurefootError as error:
        print(f"merge.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
