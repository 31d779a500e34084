"""A small random LLaVA in the published checkpoint's layout: old key names, shards, processor, tokenizer, template.

The files say what llava-hf/llava-1.5-7b-hf's say; sizes, words and weights are this project's own.
"""

import json
import re

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from derm_compress.data import dialogue

SIZE, PATCH = 56, 14
BLOCKS = 3
TEMPLATE = (  # role in capitals, pictures first, a blank after each text; nothing ends an answer
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OLD = (  # today's names, and the published ones
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)


def old_name(name):
    for pattern, published in OLD:
        name = re.sub(pattern, published, name)
    return name


def tokenizer():
    """Pieces of words with byte fallback, as LLaMA's; <image> and <pad> come after the trained vocabulary."""
    texts = [
        t
        for name in dialogue.diseases()
        for k in dialogue.QUESTIONS
        for t in dialogue.answers(name, {}, k)
    ]
    texts += [f"USER: {dialogue.question(kind)} ASSISTANT: " for kind in dialogue.QUESTIONS] * 5
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = (
        pre_tokenizers.Metaspace()
    )  # in training alone: no piece goes on into the next word
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in ("<image>", "<pad>")]
    )
    return made


def write_processor(folder, *, size=SIZE, additional=1):
    """The published files of processor and tokenizer; 336 px is the true size."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **words).save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "LlavaProcessor",
        "add_bos_token": True,
    }
    _write(
        folder / "tokenizer_config.json",
        told | {"model_max_length": 10**30, "legacy": True, "image_token": "<image>"},
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write(folder / "chat_template.json", {"chat_template": TEMPLATE})
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    _write(folder / "preprocessor_config.json", {
        "crop_size": {"height": size, "width": size}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": mean, "image_std": std,
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "resample": 3,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": size},
    })  # fmt: skip
    _write(folder / "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": additional, "patch_size": PATCH,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
    })  # fmt: skip
    return made


def write(folder, *, rename=None, extra=None):
    """The whole model folder in two shards; returns the weights by today's names. rename: of the published ones."""
    made = write_processor(folder)
    image, pad = (made.token_to_id(word) for word in ("<image>", "<pad>"))
    text = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 192, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": BLOCKS, "max_position_embeddings": 512, "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "vocab_size": made.get_vocab_size() + 62, "initializer_range": 0.1,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "image_size": SIZE, "intermediate_size": 64, "model_type": "clip_vision_model",
        "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": PATCH, "projection_dim": 24, "vocab_size": 99,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": image,
        "model_type": "llava", "pad_token_id": pad, "projector_hidden_act": "gelu", "text_config": text,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_config": tower, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad},
    )
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)).half()
    state = {name: weight.contiguous() for name, weight in made.state_dict().items()}
    files = {(rename or str)(old_name(name)): weight for name, weight in state.items()} | (
        extra or {}
    )
    shards = {f"model-0000{i + 1}-of-00002.safetensors": list(files)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: files[name] for name in names}, folder / shard, metadata={"format": "pt"})
    where = {name: shard for shard, names in shards.items() for name in names}
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return state


def _write(path, value):
    path.write_text(json.dumps(value, indent=2), "utf-8")
