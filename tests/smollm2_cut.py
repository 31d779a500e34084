"""Small cuts of what the small model is made of: a GGUF with random weights, a tower for it."""

import json
import shutil

import gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig

from derm_compress.model.loading import TINY

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (  # as SmolLM2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path, *, blocks=2, head=64, heads=9, kv_heads=3, mlp=1536, seed=0, more=()):
    """A LLaMA with grouped heads and a tied head: norms in F32, linears in Q4_1, words in Q8_0.

    The words are the tiny model's; `more`: names of further tensors.
    """
    hidden, rng = head * heads, torch.Generator().manual_seed(seed)
    told = json.loads((TINY / "tokenizer.json").read_text("utf-8"))["model"]
    words = MARKS + [word for word in told["vocab"] if not word.startswith("<")]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(MARKS) + [1] * (len(words) - len(MARKS)))
    writer.add_token_merges([" ".join(pair) for pair in told["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)  # wrong, as in many such files
    writer.add_chat_template(TEMPLATE)

    def add(name, *shape, kind):
        values = torch.randn(*shape, generator=rng).numpy() * (0.1 if len(shape) > 1 else 1)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    add("token_embd.weight", len(words), hidden, kind=kinds.Q8_0)
    add("output_norm.weight", hidden, kind=kinds.F32)
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv_heads * head, hidden),
        "attn_v": (kv_heads * head, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    for block in range(blocks):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{norm}.weight", hidden, kind=kinds.F32)
        for name, shape in shapes.items():
            add(f"blk.{block}.{name}.weight", *shape, kind=kinds.Q4_1)
    for name in more:
        add(name, 32, kind=kinds.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tower(folder, language_model, *, seed=0):
    """What the package brings beside a language model: tiny's tower, a random projector."""
    folder.mkdir()
    tiny, hidden = LlavaConfig.from_pretrained(TINY), language_model.config["hidden_size"]
    LlavaConfig(
        vision_config=tiny.vision_config,
        text_config=language_model.config,
        image_token_index=language_model.tokenizer.image_token_id,
        vision_feature_layer=-1,
        image_seq_length=tiny.image_seq_length,
    ).save_pretrained(folder)
    shutil.copyfile(TINY / "processor_config.json", folder / "processor_config.json")
    tower = load_file(TINY / "model.safetensors")
    weights = {f"model.{k}": weight for k, weight in tower.items() if k.startswith("vision_tower")}
    rng, width = torch.Generator().manual_seed(seed), tiny.vision_config.hidden_size
    for name, inputs in (("linear_1", width), ("linear_2", hidden)):
        weight = torch.randn(hidden, inputs, generator=rng) / inputs**0.5
        weights[f"model.multi_modal_projector.{name}.weight"] = weight
        weights[f"model.multi_modal_projector.{name}.bias"] = torch.zeros(hidden)
    save_file(weights, folder / "model.safetensors")
    return folder
