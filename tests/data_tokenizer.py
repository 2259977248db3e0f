"""Small byte-level BPE tokenizers with Llama 3's special tokens, for the tests of the data room."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIALS = [BOS, EOS, EOT, "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"]
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n### Response:\n### Input:\n",
    "the cat sat on the mat and the dog sat on the cat, one two three four five six seven",
    " " * 32,
] * 20

HEADER = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
ASK = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
CHAT = "{{ bos_token }}{% for message in messages %}{{ " + HEADER + " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}" + ASK
MARKED_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ "
    + HEADER
    + " }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    + "{% else %}{{ message['content'] }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    + ASK
)


@cache
def _backend() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_special_tokens(SPECIALS)
    return bpe.to_str()


def make_tokenizer(*, adds: str = "bos", chat_template: str | None = CHAT, trims: bool = False, **named: Any) -> Any:
    """A tokenizer whose own rule adds `adds` (bos, bos eos, eos, or nothing); `trims` leaves leading spaces out of the offsets, as GPT-2 does."""
    bpe = Tokenizer.from_str(_backend())
    rule = f"{BOS if 'bos' in adds else ''} $A {EOS if 'eos' in adds else ''}".strip()
    template = processors.TemplateProcessing(single=rule, special_tokens=[(token, bpe.token_to_id(token)) for token in (BOS, EOS)])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trims), template])
    values = {"bos_token": BOS, "eos_token": EOS, "chat_template": chat_template, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{**values, **named})
