"""export.py: a trained model in the form that a server loads, with the proof that it still says the same.

python scripts/export.py --adapter RUN --format gguf-q8_0 [--out FOLDER]
python scripts/export.py --model FOLDER --format bnb-4bit [--out FOLDER]
python scripts/export.py --model FOLDER --push_to_hub OWNER/NAME [--confirm_push]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot.errors import SurefootError, UsageError, joined  # noqa: E402

HELP = f"""\
{__doc__}
  --adapter=FOLDER    a run folder, checkpoint or PEFT adapter; it is merged first (scripts/merge.py --help)
  --model=FOLDER      or a model: merged by scripts/merge.py, or trained with --adapter_name=full
  --format=NAME       bf16, fp16, fp32  merged safetensors, as scripts/merge.py writes them (with --adapter)
                      bnb-4bit          bitsandbytes NF4; it rounds the merged weights, so that it is not what was trained to the digit
                      gguf-f32, gguf-f16, gguf-bf16, gguf-q8_0  for llama.cpp and Ollama: Llama, Mistral, Qwen2 and Qwen3 with a byte-level
                                        BPE tokenizer; for others and for rope scaling other than Llama 3's give --converter
  --converter=FILE    llama.cpp's convert_hf_to_gguf.py, used instead of this program's own GGUF writer
  --out=FOLDER        (ADAPTER or MODEL)/FORMAT; it appears whole or not at all
  --onto, --base_model, --overwrite, --parity, --prompts  as in scripts/merge.py
  --push_to_hub=OWNER/NAME  lists what would be sent to a private repository, and sends nothing
  --confirm_push      sends it; only an export whose parity holds

Beside the weights: parity.json, surefoot_meta.json, SERVING.md with the vLLM and Ollama commands, Modelfile.
K-quants (q4_k_m and others): export gguf-f16, then llama.cpp's llama-quantize; no parity is measured for them.
DoRA adapters cannot be served unmerged by vLLM or llama.cpp: their LoRA loaders know no magnitude vector.
Exit codes: 0 done; 2 a flag or folder; 4 beyond the parity band (the result is then in OUT.refused); 5 the model, the disk or the Hub."""


def export(
    adapter: str = "",
    model: str = "",
    format: str = "",
    out: str = "",
    converter: str = "",
    onto: str = "seen",
    base_model: str = "",
    overwrite: bool = False,
    parity: bool = True,
    prompts: str = "",
    push_to_hub: str = "",
    confirm_push: bool = False,
) -> None:
    """Exports, and says what a push to the Hub would send, or sends it."""
    from surefoot.export import formats, hub, source, story

    _check(adapter, model, format, push_to_hub, confirm_push)
    say = partial(print, flush=True)
    if push_to_hub:
        hub.check(push_to_hub)
    where = Path(out or f"{(adapter or model).rstrip('/')}/{format}") if format else Path(model)
    if format in ("bf16", "fp16", "fp32"):
        story.merge_adapter(source.read(adapter, base_model, onto), story.Job(where, format, overwrite, parity, prompts, 4 << 30), say)
    elif format:
        job = formats.Job(where, format, overwrite, parity, prompts, converter)
        if adapter:
            formats.of_adapter(source.read(adapter, base_model, onto), job, say)
        else:
            formats.of_model(Path(model), job, say)
    if push_to_hub:
        hub.push(where, push_to_hub, is_confirmed=confirm_push, say=say)


def _check(adapter: str, model: str, form: str, push_to_hub: str, confirm_push: bool) -> None:
    from surefoot.export import formats

    problems = []
    if bool(adapter) == bool(model):
        problems.append("give one of --adapter and --model")
    known = ("bf16", "fp16", "fp32", *formats.FORMS)
    if form and form not in known:
        hint = "; K-quants are made from gguf-f16 by llama.cpp's llama-quantize" if "q4" in form or "_k" in form else ""
        problems.append(f"--format={form} must be one of {', '.join(known)}{hint}")
    if not form and not (model and push_to_hub):
        problems.append(f"give --format: one of {', '.join(known)}")
    if model and form in ("bf16", "fp16", "fp32"):
        problems.append(f"--format={form} is made from --adapter: --model={model} is whole already")
    if confirm_push and not push_to_hub:
        problems.append("--confirm_push has a meaning only with --push_to_hub=OWNER/NAME")
    if problems:
        raise UsageError(joined(problems))


def main() -> int:
    import fire

    from surefoot.export.words import tidy

    argv = sys.argv[1:]
    if not argv or any(word in ("-h", "--help", "help") for word in argv):
        print(HELP)
        return 0
    try:
        fire.Fire(export, command=tidy(export, argv), serialize=lambda _: None)
    except SurefootError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
