"""export.py: a trained model in the form that a server loads, with the proof that it still says the same.

python scripts/export.py --adapter RUN --format gguf-q8_0 [--out FOLDER]
python scripts/export.py --model FOLDER --format bnb-4bit [--out FOLDER]
python scripts/export.py --model FOLDER --push_to_hub OWNER/NAME [--confirm_push]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.errors import UsageError, joined  # noqa: E402
from surefoot.export import FORMS  # noqa: E402
from surefoot.script import flag  # noqa: E402

MERGED = ("bf16", "fp16", "fp32")
USAGE = f"""\
{__doc__}
Formats:
  bf16, fp16, fp32  merged safetensors, as scripts/merge.py writes them (with --adapter)
  bnb-4bit          bitsandbytes NF4; it rounds the merged weights, so that it is not what was trained to the digit
  gguf-f32, gguf-f16, gguf-bf16, gguf-q8_0  for llama.cpp and Ollama: Llama, Mistral, Qwen2 and Qwen3 with a byte-level BPE tokenizer
                    (--converter for others, and for rope scaling other than Llama 3's)
Beside the weights: parity.json, surefoot_meta.json, SERVING.md with the vLLM and Ollama commands, Modelfile.
K-quants (q4_k_m and others): export gguf-f16, then llama.cpp's llama-quantize; no parity is measured for them.
DoRA adapters cannot be served unmerged by vLLM or llama.cpp: their LoRA loaders know no magnitude vector.
Exit codes: 0 done; 2 a flag or folder; 4 beyond the parity band (the result is then in OUT.refused); 5 the model, the disk or the Hub."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    adapter: str = flag("", "a run folder, checkpoint or PEFT adapter; it is merged first (scripts/merge.py --help)")
    model: str = flag("", "or a model: merged by scripts/merge.py, or trained with --adapter_name=full")
    format: str = flag("", "one of those above")
    out: str = flag("", "default: FORMAT in --adapter or --model. It appears whole or not at all")
    converter: str = flag("", "llama.cpp's convert_hf_to_gguf.py, used instead of this program's own GGUF writer")
    onto: str = flag("seen", "as in scripts/merge.py")
    base_model: str = flag("", "as in scripts/merge.py")
    overwrite: bool = flag(False, "replace an earlier export in --out")
    parity: bool = flag(True, "as in scripts/merge.py")
    prompts: str = flag("", "as in scripts/merge.py")
    push_to_hub: str = flag("", "OWNER/NAME: lists what would be sent to this private repository, and sends nothing")
    confirm_push: bool = flag(False, "sends it; only an export whose parity holds")


def run(flags: Flags) -> None:
    """Exports, and says what a push to the Hub would send, or sends it."""
    from surefoot.export import hub, place, prompts, source

    _check(flags)
    form, say = flags.format, partial(print, flush=True)
    if flags.push_to_hub:
        hub.check(flags.push_to_hub)
    where = Path(flags.out or f"{(flags.adapter or flags.model).rstrip('/')}/{form}") if form else Path(flags.model)
    found = source.read(flags.adapter, flags.base_model, flags.onto) if flags.adapter else None
    if not found:
        source.check_model(Path(flags.model))
    if form:
        place.check(where, overwrites=flags.overwrite)
        prompts.load(flags.prompts)
    from surefoot.export import formats, story  # torch: after the flags are known to be good

    if found and form in MERGED:
        story.merge_adapter(found, story.Job(where, form, flags.overwrite, flags.parity, flags.prompts, 4 << 30), say)
    elif form:
        job = formats.Job(where, form, flags.overwrite, flags.parity, flags.prompts, flags.converter)
        if found:
            formats.of_adapter(found, job, say)
        else:
            formats.of_model(Path(flags.model), job, say)
    if flags.push_to_hub:
        hub.push(where, flags.push_to_hub, is_confirmed=flags.confirm_push, say=say)


def _check(flags: Flags) -> None:
    adapter, model, form = flags.adapter, flags.model, flags.format
    problems = []
    if bool(adapter) == bool(model):
        problems.append("give one of --adapter and --model")
    known = (*MERGED, *FORMS)
    if form and form not in known:
        hint = "; K-quants are made from gguf-f16 by llama.cpp's llama-quantize" if "q4" in form or "_k" in form else ""
        problems.append(f"--format={form} must be one of {', '.join(known)}{hint}")
    if not form and not (model and flags.push_to_hub):
        problems.append(f"give --format: one of {', '.join(known)}")
    if model and form in MERGED:
        problems.append(f"--format={form} is made from --adapter: --model={model} is whole already")
    if flags.converter and not form.startswith("gguf"):
        problems.append(f"--converter has a meaning only with a GGUF format, not with --format={form}")
    elif flags.converter and not Path(flags.converter).is_file():
        problems.append(f"--converter={flags.converter} does not exist: give the path of llama.cpp's convert_hf_to_gguf.py")
    if flags.confirm_push and not flags.push_to_hub:
        problems.append("--confirm_push has a meaning only with --push_to_hub=OWNER/NAME")
    if problems:
        raise UsageError(joined(problems))


if __name__ == "__main__":
    sys.exit(script.main(Flags, USAGE, run))
