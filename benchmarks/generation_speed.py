"""generation_speed.py: what an adapter costs while generating: LoRA and DoRA as PEFT has them and as scripts/infer.py serves them.

python benchmarks/generation_speed.py --model=examples/small_model --out=benchmarks/results/generation_speed_cpu.json
python benchmarks/generation_speed.py --model=models/smollm2 --dtype=bf16 --out=benchmarks/results/generation_speed_h200.json  # a GPU

Each round generates the same number of tokens with each system in turn; a ratio is the median over rounds of that round's ratio of seconds.
The adapter (all linear layers, random) is no training's, and its logits must be the same under both ways of computing them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RATIOS = (("dora_served", "lora_served"), ("dora_served", "lora_peft"), ("dora_peft", "lora_peft"), ("dora_served", "base"))
DTYPES = ("fp32", "bf16", "fp16")


def bench(
    model: str, out: str, *, dtype: str = "fp32", r: int = 16, batches: str = "1,8", tokens: int = 48, rounds: int = 5, prompt: int = 96
) -> None:
    """Measures every system at each batch size and writes one JSON file.

    Args:
        batches: batch sizes with commas between them; tokens: generated in a round; prompt: tokens of each prompt.
    """
    import torch

    from surefoot import machine, runtime

    if dtype not in DTYPES:
        sys.exit(f"generation_speed.py: --dtype={dtype} is not one of {', '.join(DTYPES)}")
    runtime.quiet()
    sizes = [int(size) for size in (batches if isinstance(batches, tuple) else str(batches).split(","))]
    systems = {name: made(model, name, dtype, r) for name in ("base", "lora_peft", "lora_served", "dora_peft", "dora_served")}
    gaps = {kind: logit_gap(systems[f"{kind}_peft"], systems[f"{kind}_served"]) for kind in ("lora", "dora")}
    here = machine.probe()
    content: dict[str, Any] = {
        "setting": {"model": Path(model).name, "dtype": dtype, "r": r, "tokens": tokens, "rounds": rounds, "prompt": prompt},
        "machine": {"gpu": here.gpu.name if here.gpu else None, "cpu": here.cpu_name, "threads": torch.get_num_threads()},
        "versions": {name: here.versions.get(name) for name in ("torch", "transformers", "peft")},
        "greatest_logit_gap_of_served_to_peft": gaps,
        "batches": [],
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        row = measured(systems, size, tokens, rounds, prompt)
        content["batches"].append(row)
        Path(out).write_text(json.dumps(content, indent=1) + "\n")
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in row["tokens_per_s"].items())
        print(f"batch {row['batch']}: tokens/s {rates}")
        print("  time of " + ", ".join(f"{name} {ratio['median']:.2f}x" for name, ratio in row["time_ratios"].items()))


def made(path: str, name: str, dtype: str, r: int) -> Any:
    """The model of one system, its adapter random with B not zero, so that DoRA's factor is not 1."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from surefoot.backends.hf import DTYPES
    from surefoot.ops.served import serve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa").to(device).eval()
    if name == "base":
        return model
    kind, way = name.split("_")
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", use_dora=kind == "dora", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.mul_(0.1)
    return serve(adapted, DTYPES[dtype])[0] if way == "served" else adapted


def logit_gap(one: Any, other: Any) -> float:
    import torch

    ids = torch.arange(10, 74, device=one.device)[None]
    with torch.no_grad():
        return float((one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())


def measured(systems: dict[str, Any], batch: int, tokens: int, rounds: int, prompt: int) -> dict[str, Any]:
    """Rounds of every system in turn, the first one not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, model in systems.items():
            spent = generation_s(model, batch, tokens, prompt)
            if number:
                seconds[name].append(spent)
    ratios = {}
    for top, below in RATIOS:
        values = [one / other for one, other in zip(seconds[top], seconds[below], strict=True)]
        ratios[f"{top}/{below}"] = {
            name: round(pick(values), 3) for name, pick in (("median", statistics.median), ("low", min), ("high", max))
        }
    rates = {name: round(batch * tokens / statistics.median(values), 2) for name, values in seconds.items()}
    return {"batch": batch, "tokens_per_s": rates, "time_ratios": ratios}


def generation_s(model: Any, batch: int, tokens: int, prompt: int) -> float:
    import torch
    from transformers import GenerationConfig

    ids = torch.arange(10, 10 + prompt, device=model.device).repeat(batch, 1)
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert out.shape[1] == prompt + tokens
    return time.perf_counter() - began


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
