"""A LLaMA decoder out of a GGUF file, as the language model of a LLaVA: config, weights, words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from derm_compress.errors import DermError, first_line
from derm_compress.model.anatomy import EMBEDDING

IMAGE = "<image>"
ROWS = 64  # an embedding has a multiple of these
PREFIX = "model.language_model."
OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": f"{PREFIX}norm.weight"}
INSIDE = {  # of a block
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
SPECIAL = gguf.TokenType.CONTROL


@dataclass(frozen=True)
class LanguageModel:
    """What a LLaVA takes of a language model; the head is the embedding."""

    config: dict  # of a LlamaConfig
    weights: dict[str, torch.Tensor]  # fp16, by their names in LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast  # with the image token
    template: str  # of conversations in texts


def read_language_model(path: Path, *, bos: str, eos: str, pad: str) -> LanguageModel:
    """Read a GGUF of a LLaMA with tied embeddings and byte-level words; DermError for any other.

    bos, eos, pad: its special tokens, which such files often name wrongly.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = fields["general.architecture"], fields["tokenizer.ggml.model"]
        if kind != ("llama", "gpt2"):
            raise DermError(f"it is a {kind[0]} with {kind[1]}'s words; known: llama, gpt2")
        tokenizer = _tokenizer(fields, bos_token=bos, eos_token=eos, pad_token=pad)
        config = _config(fields, tokenizer)
        weights = dict(_weights(reader.tensors, config))
        return LanguageModel(config, weights, tokenizer, fields["tokenizer.chat_template"])
    except DermError as error:
        raise DermError(f"GGUF file {path.name}: {error}") from error
    except Exception as error:  # other people's files hold anything
        raise DermError(f"GGUF file {path.name}: cannot be read: {first_line(error)}") from error


def _config(fields: dict, tokenizer: PreTrainedTokenizerFast) -> dict:
    told = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads = told["attention.head_count"]
    return {
        "model_type": "llama",
        "vocab_size": -(-len(tokenizer) // ROWS) * ROWS,
        "hidden_size": told["embedding_length"],
        "intermediate_size": told["feed_forward_length"],
        "num_hidden_layers": told["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": told.get("attention.head_count_kv", heads),
        "head_dim": told["embedding_length"] // heads,
        "max_position_embeddings": told["context_length"],
        "rms_norm_eps": float(f"{told['attention.layer_norm_rms_epsilon']:.6g}"),  # kept in fp32
        "rope_parameters": {"rope_type": "default", "rope_theta": told["rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _tokenizer(fields: dict, **special: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, as GGUF's pre-tokenizer `smollm` says."""
    words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise DermError(
            f"its words are split as {fields['tokenizer.ggml.pre']} does; known: smollm"
        )
    if missing := set(special.values()) - set(words):
        raise DermError(f"it has no token {', '.join(sorted(missing))}")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
    made.decoder = decoders.ByteLevel()
    marks = [word for word, kind in zip(words, kinds, strict=True) if kind == SPECIAL]
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in [*marks, IMAGE]])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=fields["llama.context_length"],
        **special,
    )


def _weights(tensors, config: dict):
    """(name, weight) of each tensor; DermError for one that a LLaMA with a tied head has not."""
    for tensor in tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        inside = BLOCK.fullmatch(tensor.name)
        if inside and inside[2] in INSIDE:
            if inside[2] in ("attn_q", "attn_k"):
                values = _in_halves(values, config["head_dim"])
            name = f"{PREFIX}layers.{inside[1]}.{INSIDE[inside[2]]}.weight"
        elif tensor.name in OUTSIDE:
            name = OUTSIDE[tensor.name]
        else:
            raise DermError(f"{tensor.name} has no place in a LLaMA with a tied head")
        if name == EMBEDDING:
            values = _padded(values, config["vocab_size"])
        yield name, torch.from_numpy(values.astype(np.float16))


def _in_halves(values: np.ndarray, head: int) -> np.ndarray:
    """Rows as Transformers turns them: GGUF keeps the two that turn together side by side."""
    pairs = values.reshape(-1, head // 2, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _padded(embedding: np.ndarray, rows: int) -> np.ndarray:
    """With rows for the image token and beyond: the mean, whose logit is never the largest."""
    more = np.repeat(embedding.mean(0, keepdims=True), rows - len(embedding), axis=0)
    return np.concatenate([embedding, more])
