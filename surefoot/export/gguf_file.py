"""GGUF: Llama, Mistral, Qwen2 and Qwen3 written tensor by tensor with the gguf package; everything else by llama.cpp's converter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType

from surefoot.errors import BackendError, UsageError
from surefoot.export import gguf_vocab, shards
from surefoot.export.gguf_vocab import WAY_OUT, Vocabulary
from surefoot.export.shards import Stored

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
TYPES = {
    "gguf-f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "gguf-f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "gguf-bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "gguf-q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


class Tensor(NamedTuple):
    """A tensor to write: its name in GGUF, where it comes from, its type there, and the heads to permute its rows by (0: none)."""

    name: str
    stored: Stored
    type: GGMLQuantizationType
    heads: int

    def made(self) -> np.ndarray[Any, Any]:
        weight = self.stored.read().float()
        if self.heads:  # llama.cpp rotates neighbouring pairs of rows, transformers the two halves of a head
            weight = weight.reshape(self.heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        return gguf.quants.quantize(weight.contiguous().numpy(), self.type)


def check(folder: Path, config: dict[str, Any]) -> None:
    """Raises UsageError for what this writer does not write, with the way out."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UsageError(f"{folder}: a GGUF of model type {kind} is not written here (known: {', '.join(ARCHITECTURES)}). {WAY_OUT}")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise UsageError(f"{folder}: rope type {rope['rope_type']} is not written here (default, llama3). {WAY_OUT}")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
        raise UsageError(f"{folder}: sliding_window={window} is not written here. {WAY_OUT}")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Of transformers 5 (rope_parameters) or 4 (rope_scaling and rope_theta)."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), **found}


def write(folder: Path, file: Path, form: str) -> Iterator[Tensor]:
    """Writes the model in `folder` to `file`, yielding each tensor once it is written; one tensor is in memory.

    Args:
        form: a key of TYPES. Tensors of one dimension stay fp32; rows that q8_0's blocks of 32 do not fit are f16.

    Raises:
        UsageError: this writer does not know the architecture or the tokenizer.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check(folder, config)
    found = tensors(folder, config, form)
    rows = next(tensor.stored.shape[0] for tensor in found if tensor.name == "token_embd.weight")
    vocabulary = gguf_vocab.read(folder, rows)
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]])
    _add_config(writer, config, TYPES[form][1], folder.name)
    _add_vocabulary(writer, vocabulary)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in found:
        shape = gguf.quant_shape_to_byte_shape(tensor.stored.shape, tensor.type)
        dtype = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(tensor.type, np.uint8)
        size = int(np.prod(shape))
        writer.add_tensor_info(
            tensor.name, shape if dtype == np.uint8 else tensor.stored.shape, np.dtype(dtype), size, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in found:
            writer.write_tensor_data(tensor.made())
            yield tensor
    except OSError as error:
        raise BackendError(f"{file} cannot be written ({error}). Is the disk full?") from None
    writer.close()


def tensors(folder: Path, config: dict[str, Any], form: str) -> list[Tensor]:
    """What is written of the model in `folder`. Raises UsageError: a tensor that has no place in a GGUF."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])
    is_llama = ARCHITECTURES[config["model_type"]] == gguf.MODEL_ARCH.LLAMA
    found = []
    for stored in shards.stored(folder).values():
        if stored.name.endswith("rotary_emb.inv_freq") or (config.get("tie_word_embeddings") and stored.name == "lm_head.weight"):
            continue
        name = names.get_name(stored.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UsageError(f"{folder}: {stored.name} has no place in a GGUF of {config['model_type']}. {WAY_OUT}")
        is_query, is_key = ".attn_q." in name, ".attn_k." in name
        heads = (config["num_attention_heads"] if is_query else _key_heads(config)) if is_llama and (is_query or is_key) else 0
        found.append(Tensor(name, stored, _type(stored, TYPES[form][0]), heads))
    return found


def _type(stored: Stored, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(stored.shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if kind == GGMLQuantizationType.Q8_0 and stored.shape[-1] % 32 else kind


def _key_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def rope_factors(config: dict[str, Any]) -> np.ndarray[Any, Any] | None:
    """Llama 3.1's scaling as llama.cpp wants it: by what each frequency is divided [head_dim / 2]; None under plain rotation."""
    if _rope(config).get("rope_type", "default") != "llama3":
        return None
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = AutoConfig.for_model(**config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model, torch.device("cpu"))
    plain = 1.0 / _rope(config)["rope_theta"] ** (torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled)))
    factors: np.ndarray[Any, Any] = (plain / scaled).float().numpy()
    return factors


def _add_config(writer: GGUFWriter, config: dict[str, Any], file_type: LlamaFileType, name: str) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_key_heads(config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def differences(file: Path, folder: Path) -> list[str]:
    """What the GGUF's tokenizer says otherwise than the one in `folder`, read back from the file itself.

    transformers' own reader gives Llama's tokenizer another splitting, and BOS for EOS, so that it cannot judge.
    """
    fields = GGUFReader(file).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else None

    tokens = field("ggml.tokens")
    expected = gguf_vocab.read(folder, len(tokens))
    pairs: dict[str, tuple[Any, Any]] = {
        "chat template": (field("chat_template"), expected.chat_template),
        "tokens": (tokens, expected.tokens),
        "merges": (field("ggml.merges"), expected.merges),
        "pre-tokenizer": (field("ggml.pre"), expected.pre),
        "adding of BOS": (field("ggml.add_bos_token"), expected.adds_bos),
    }
    pairs |= {f"{name} id": (field(f"ggml.{name}_token_id") if name != "pad" else field("ggml.padding_token_id"), index)
              for name, index in expected.special.items()}  # fmt: skip
    return [
        f"{name} of the GGUF {'is another' if there is not None else 'is missing'}"
        for name, (there, here) in pairs.items()
        if there != here
    ]


def convert(converter: str, folder: Path, file: Path, form: str) -> None:
    """Runs llama.cpp's convert_hf_to_gguf.py in a process of its own. Raises BackendError: it failed."""
    command = [sys.executable, converter, str(folder), "--outfile", str(file), "--outtype", form.removeprefix("gguf-")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not file.is_file():
        last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:]
        raise BackendError(f"--converter={converter} failed (exit {done.returncode}): {last[0] if last else 'it said nothing'}")
