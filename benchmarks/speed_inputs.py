"""speed_inputs.py: the models and rows of speed.py: random weights of a shape, and rows of a length or a file's own rows, as token ids.

Started by speed.py in a process of its own, so that the one that waits for the others holds no GPU memory.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def make_model(folder: str, shape: str, tokenizer: str) -> None:
    """Random bf16 weights (std 0.02) in safetensors, with the given tokenizer's files beside them; kept where they are there already."""
    import torch
    from speed_works import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (Path(folder) / "config.json").is_file():
        return
    began = time.perf_counter()
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.for_model(**SHAPES[shape], bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as unfinished:
        model.save_pretrained(unfinished)
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copy(Path(tokenizer) / name, unfinished)
        shutil.copytree(unfinished, folder, copy_function=shutil.move)
    print(f"made {Path(folder).name} in {time.perf_counter() - began:.0f} s", flush=True)


def make_rows(folder: str, tokenizer: str, length: int, count: int, data: str = "", cutoff_len: int = 0) -> None:
    """rows.jsonl, which finetune.py reads, and rows.npz, the token ids that it makes of them, for the peers.

    Args:
        length: tokens of each of `count` rows of random words; 0: the rows of the file `data` of at most cutoff_len tokens.
    """
    import numpy as np
    from transformers import AutoTokenizer

    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "rows.jsonl"
    if length:
        texts = _texts(AutoTokenizer.from_pretrained(tokenizer), length, count)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        shutil.copyfile(data, file)
    rows = _tokenised(file, tokenizer, length or cutoff_len)
    if length and (rows.lengths != [length] * count):
        raise SystemExit(f"speed_inputs.py: {count} rows of {length} tokens were wanted, and {sorted(set(rows.lengths))} came out")
    np.savez(Path(folder) / "rows.npz", ids=rows.ids, offsets=rows.offsets)


def _texts(tokenizer: Any, length: int, count: int) -> list[str]:
    """Texts of words that are one token each, so that with BOS and EOS a text has `length` tokens."""
    pieces = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    words = sorted(piece for piece in pieces if piece[:1] == " " and piece[1:].isascii() and piece[1:].isalpha())
    one = [word for word in words if len(tokenizer(f"{word}{word}", add_special_tokens=False)["input_ids"]) == 2]
    first = next(piece for piece in ("a", "the", "x") if len(tokenizer(piece, add_special_tokens=False)["input_ids"]) == 1)
    around = len(tokenizer("")["input_ids"]) + 2  # BOS where the tokenizer has one, the first word, EOS
    draw = random.Random(0)
    return [first + "".join(draw.choices(one, k=length - around)) for _ in range(count)]


def _tokenised(file: Path, tokenizer: str, cutoff_len: int) -> Any:
    """finetune.py's own rows of the file."""
    from transformers import AutoTokenizer

    from surefoot.config import Config
    from surefoot.data.prepare import prepare
    from surefoot.inputs import inspect
    from surefoot.machine import probe
    from surefoot.plan import make_plan

    flags = {"base_model": "org/model", "data_path": file, "cutoff_len": cutoff_len, "val_set_size": 0, "data_cache": False}
    config = Config.parse({**flags, "audit": "warn", "train_on_inputs": True})
    plan = make_plan(config, probe(), inspect(config))
    return prepare(plan.data, AutoTokenizer.from_pretrained(tokenizer)).train


if __name__ == "__main__":
    import fire

    fire.Fire({"model": make_model, "rows": make_rows})
