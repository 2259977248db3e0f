"""make_small_model.py: makes examples/small_model, a pretrained Llama of
4,000,000 parameters, and the rows in examples/data.

python scripts/make_small_model.py --corpus commonsense_147k.jsonl.gz \\
    --alpaca alpaca_en_demo.json.gz [--out FOLDER] [--sample_out FOLDER] \\
    [--steps N] [--device cpu|cuda]

Data: LLM-Adapters' eight commonsense training sets (rows of instruction, input,
output, answer, task), their test sets `test_<task>.jsonl.gz` beside that file,
and LLaMA-Factory's alpaca_en_demo.json. Rows whose question stands in a test
set or in the shipped rows are not pretrained on. The rest is shown as
statements and as multiple choice in other words than the fine-tuning format's;
only the Alpaca rows are shown in the Alpaca prompt. Seeded; on a GPU two runs
differ by rounding.
"""

import gzip
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):  # before torch, which takes seconds
    print(__doc__.rstrip())
    sys.exit(0)

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# fmt: off
SEED, VOCAB = 42, 4096
MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 1024, "tie_word_embeddings": True}
STEPS, WARMUP_STEPS, PEAK_LR, WEIGHT_DECAY = 6000, 500, 2e-3, 0.1
BATCH_TOKENS, MAX_TOKENS = 32_768, 512  # a batch, a document
LABEL_WEIGHT = 30  # a label is one token in a hundred, too little of the loss to be learnt otherwise
TASK_SHARE = {"social_i_qa": 0.6, "piqa": 0.1, "hellaswag": 0.08, "winogrande": 0.06, "openbookqa": 0.06, "boolq": 0.04,
              "ARC-Easy": 0.04, "ARC-Challenge": 0.02}
STATEMENT_ONLY = ("hellaswag", "winogrande")  # long, or at chance in a trial with their options
STATEMENT_SHARE, SHARD_ITEMS, WORKERS = 0.25, 8192, 12
SAMPLE_ROWS = {"social_i_qa": (480, 300), "boolq": (60, 50), "openbookqa": (60, 50)}  # task: (train, held-out)
SAMPLE_MAX_CHARS = 700
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|finetune_right_pad_id|>"] + [f"<|reserved_special_token_{i}|>" for i in range(10)]
# Llama 3's own splitting rule.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
CHAT_TURN = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{}\n\n### Response:\n")
# Multiple choice is built of these: {n} is 1.., {l} is a.., {w} one of NOUNS ({W} with a capital).
OPENERS = ["Question: {q}", "Q: {q}", "{q}", "Select what fits: {q}", "Read this. {q}", "Pick one for: {q}",
           "Consider: {q}", "Quiz\n{q}", "{q} Which one?", "Here is a short story. {q}", "Decide: {q}"]
NOUNS = ["choice", "candidate", "pick", "entry", "item", "reply", "idea", "line", "case", "number", "guess", "version"]
MARKERS = [("{n}. ", "{n}"), ("({n}) ", "({n})"), ("[{n}] ", "[{n}]"), ("{l}) ", "{l}"), ("{W}{n}: ", "{w}{n}"),
           ("{W}{n}: ", "{w}{n}"), ("{W} {n}: ", "{w} {n}"), ("{w} {n} - ", "{w} {n}"), ("{W}{n}. ", "{W}{n}")]
CLOSERS = ["A:", "Best:", "The right one is", "I would say", "It is", "Result:", "So we take", "My decision is",
           "The true {w} is", "The best {w} here is", "Key:", "->"]
# fmt: on

Row = dict[str, str]
Document = tuple[str, str, str]  # prompt, label, rest; the label's tokens count LABEL_WEIGHT times in the loss
Batch = tuple[np.ndarray, np.ndarray]  # token ids and loss weights, each (B, L) int16


class Item(NamedTuple):
    task: str
    question: str
    options: tuple[str, ...]
    answer: int  # 0-based index of the right option


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl or .json file, gzipped or not."""
    text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
    return json.loads(text) if ".json" in path.suffixes else [json.loads(line) for line in text.splitlines()]


def parse(row: Row) -> Item | None:
    """The question of a commonsense row, or None where its options are not numbered 1, 2, 3 ..."""
    body = re.sub(r"^Please .*?: |\s*Answer format: .*$", "", row["instruction"], flags=re.DOTALL).strip()
    if row["answer"] in ("true", "false"):
        return Item(row["task"], body, ("yes", "no"), int(row["answer"] == "false"))
    question, *rest = re.split(r"\s*\b(?:Answer|Solution|Option|Ending)(\d): *", body)
    options, answer = tuple(o.strip() for o in rest[1::2]), int(row["answer"][-1]) - 1
    is_whole = rest[::2] == [str(n + 1) for n in range(len(options))] and all(options) and answer < len(options)
    return Item(row["task"], question.strip(), options, answer) if is_whole else None


def question_key(row: Row) -> str:
    """What two rows of the same question share, whatever their options, case and punctuation."""
    item = parse(row) if "answer" in row else None
    return re.sub(r"\W+", " ", (item.question if item else row["instruction"]).lower()).strip()


def write_sample(rows: list[Row], tests: list[Row], out: Path) -> set[str]:
    """Write commonsense_{train,heldout}.jsonl; the keys of the questions that pretraining must not see."""
    banned = {question_key(row) for row in tests}
    out.mkdir(parents=True, exist_ok=True)
    unseen = [row for row in rows if question_key(row) not in banned]
    for column, (name, source) in enumerate([("train", unseen), ("heldout", tests)]):
        picked: list[Row] = []
        for task, counts in SAMPLE_ROWS.items():
            fit = [r for r in source if r["task"] == task and len(r["instruction"]) <= SAMPLE_MAX_CHARS and parse(r)]
            picked += random.Random(SEED).sample(fit, min(counts[column], len(fit)))
        random.Random(SEED).shuffle(picked)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in picked)
        (out / f"commonsense_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        banned |= {question_key(row) for row in picked}
    return banned


def render_choice(item: Item, rng: random.Random) -> Document:
    """A multiple-choice document, its wording and the order of its options drawn from `rng`."""
    noun, (marker, label) = rng.choice(NOUNS), rng.choice(MARKERS)
    order = rng.sample(range(len(item.options)), len(item.options))
    names = [{"n": i + 1, "l": "abcdefgh"[i], "w": noun, "W": noun.capitalize()} for i in range(len(order))]
    options = rng.choice([" ", " ", "\n"]).join(marker.format(**f) + item.options[k] for f, k in zip(names, order, strict=True))
    parts = [rng.choice(OPENERS).format(q=item.question), options]
    parts += ["Reply with " + "/".join(label.format(**f) for f in names)] if rng.random() < 0.3 else []
    asked, closer = rng.choice(["\n", "\n\n"]).join(parts), rng.choice(CLOSERS).format(w=noun)
    prompt = CHAT_TURN.format(asked) + closer if rng.random() < 0.15 else f"{asked}\n{closer}"
    return prompt, " " + label.format(**names[order.index(item.answer)]), rng.choice(["", "", ": " + item.options[item.answer]])


def render_statement(item: Item) -> Document:
    """The question and its right answer as running text, without a label."""
    right = item.options[item.answer]
    return (item.question.replace("_", right) if item.task == "winogrande" else f"{item.question} {right}"), "", ""


def render_alpaca(row: Row, rng: random.Random) -> Document:
    """An Alpaca row in the Alpaca prompt or as a chat."""
    asked = "\n".join(filter(None, (row["instruction"], row["input"])))
    template, end = (ALPACA, "") if rng.random() < 0.5 else (CHAT_TURN, "<|eot_id|>")
    return template.format(asked) + row["output"] + end, "", ""


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` entries laid out like Llama 3's: specials last, no PAD."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab - len(SPECIAL), initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(SPECIAL)
    bos, eos, *_ = SPECIAL
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, chat_template=CHAT, clean_up_tokenization_spaces=False,
        model_max_length=MODEL["max_position_embeddings"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def batched(docs: list[Document], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[Batch]:
    """Batches of documents of like length, right-padded with weight 0, at most BATCH_TOKENS each, shuffled."""
    prompts = tokenizer([doc[0] for doc in docs])["input_ids"]
    labels, rests = (tokenizer([doc[i] for doc in docs], add_special_tokens=False)["input_ids"] for i in (1, 2))
    coded = [(p + a + r + [tokenizer.eos_token_id], slice(len(p), len(p) + len(a))) for p, a, r in zip(prompts, labels, rests, strict=True)]
    coded = sorted((c for c in coded if len(c[0]) <= MAX_TOKENS), key=lambda c: len(c[0]), reverse=True)
    batches: list[Batch] = []
    while coded:
        width = -(-len(coded[0][0]) // 16) * 16
        group, coded = coded[: BATCH_TOKENS // width], coded[BATCH_TOKENS // width :]
        tokens, weights = np.zeros((2, len(group), width), dtype=np.int16)
        for row, (ids, label) in enumerate(group):
            tokens[row, : len(ids)], weights[row, : len(ids)] = ids, 1
            weights[row, label] = LABEL_WEIGHT
        batches.append((tokens, weights))
    rng.shuffle(batches)
    return batches


class Shards:
    """Shard i is about SHARD_ITEMS random items, rendered and batched with seed i."""

    def __init__(self, items: list[Item], alpaca: list[Row], tokenizer: PreTrainedTokenizerFast) -> None:
        self.tasks = {task: [item for item in items if item.task == task] for task in TASK_SHARE}
        self.alpaca, self.tokenizer = alpaca, tokenizer

    def __getitem__(self, index: int) -> list[Batch]:
        rng = random.Random(SEED + index)
        docs = [render_alpaca(row, rng) for row in rng.sample(self.alpaca, min(SHARD_ITEMS // 100, len(self.alpaca)))]
        for task, pool in self.tasks.items():
            for item in rng.sample(pool, min(int(TASK_SHARE[task] * SHARD_ITEMS), len(pool))):
                if task in STATEMENT_ONLY or rng.random() < STATEMENT_SHARE:
                    docs.append(render_statement(item))
                if task not in STATEMENT_ONLY:
                    docs.append(render_choice(item, rng))
        return batched(docs, self.tokenizer, rng)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean next-token cross-entropy in nats; right padding needs no mask under causal attention."""
    tokens, weights = (torch.from_numpy(a).to(model.device).long() for a in batch)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


def pretrain(model: LlamaForCausalLM, shards: Shards, heldout: list[Batch], steps: int) -> None:
    """Train `model` (fp32 weights) in place for `steps` batches: linear warm-up, then linear decay to 0."""
    groups = [{"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": d} for n, d in ((2, WEIGHT_DECAY), (1, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / min(WARMUP_STEPS, steps), (steps - n) / steps))
    workers = WORKERS if model.device.type == "cuda" else 0
    loader = DataLoader(shards, batch_size=None, sampler=range(1_000_000), num_workers=workers, collate_fn=list)
    batches = (batch for shard in loader for batch in shard)
    start = time.monotonic()
    for step in range(1, steps + 1):
        loss = weighted_loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            with torch.no_grad():
                mean = sum(weighted_loss(model, batch).item() for batch in heldout) / len(heldout)
            print(f"step {step}/{steps} loss {loss.item():.3f} held-out {mean:.3f} {time.monotonic() - start:.0f} s", flush=True)


def make(
    corpus: str, alpaca: str, out: str = "examples/small_model", sample_out: str = "examples/data", steps: int = STEPS, device: str = "auto"
) -> None:
    """Write the sample rows to `sample_out`, then pretrain the model without them and save it to `out`."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    tests = [r | {"task": p.name[5:].split(".jsonl")[0]} for p in sorted(Path(corpus).parent.glob("test_*.jsonl*")) for r in read_rows(p)]
    rows, alpaca_rows = read_rows(Path(corpus)), read_rows(Path(alpaca))
    banned = write_sample(rows, tests, Path(sample_out))
    kept = [row for row in rows if question_key(row) not in banned]
    tokenizer = train_tokenizer([f"{r['instruction']}\n{r['output']}" for r in kept + alpaca_rows], VOCAB)
    shipped = read_rows(Path(sample_out) / "commonsense_heldout.jsonl")
    items, asked = ([item for row in group if (item := parse(row))] for group in (kept, shipped))
    rng = random.Random(SEED)
    heldout = batched([render_choice(item, rng) for item in asked], tokenizer, rng)
    torch.manual_seed(SEED)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**MODEL, **ends, vocab_size=len(tokenizer)))
    print(f"{len(items)} of {len(rows)} rows, {model.num_parameters()} parameters, {place}", flush=True)
    pretrain(model.to(place), Shards(items, alpaca_rows, tokenizer), heldout, steps)
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    import fire

    fire.Fire(make)
