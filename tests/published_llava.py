"""A small random LLaVA in the published checkpoint's layout: old key names, shards, template.

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
TEXT = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 192,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": BLOCKS,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
}
TOWER = {
    "hidden_size": 32,
    "image_size": SIZE,
    "intermediate_size": 64,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": PATCH,
    "projection_dim": 24,
    "vocab_size": 99,
}
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": TOWER,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
IMAGES = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def old_name(name):
    for pattern, published in OLD:
        name = re.sub(pattern, published, name)
    return name


def tokenizer():
    """Pieces of words with byte fallback, as LLaMA's; <image> and <pad> come after them."""
    texts = []
    for name in dialogue.diseases():
        for kind in dialogue.QUESTIONS:
            texts += dialogue.answers(name, {}, kind)
    texts += [f"USER: {dialogue.question(kind)} ASSISTANT: " for kind in dialogue.QUESTIONS] * 5
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # in training alone: pieces end with their word
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.pre_tokenizer = None
    marked = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(marked)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])
    added = [AddedToken(word, special=True, normalized=False) for word in ("<image>", "<pad>")]
    made.add_special_tokens(added)
    return made


def write_processor(folder, *, size=SIZE):
    """The published files of processor and tokenizer; 336 px is the true size."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **words).save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {
        "add_bos_token": True,
        "image_token": "<image>",
        "legacy": True,
        "model_max_length": 10**30,
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    _write(folder / "tokenizer_config.json", told)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write(folder / "chat_template.json", {"chat_template": TEMPLATE})
    sizes = {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
    _write(folder / "preprocessor_config.json", IMAGES | sizes)
    told = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    _write(folder / "processor_config.json", told)
    return made


def write(folder, *, extra=()):
    """The whole model folder in two shards; returns the weights by today's names."""
    made = write_processor(folder)
    image, pad = (made.token_to_id(word) for word in ("<image>", "<pad>"))
    text = TEXT | {"vocab_size": made.get_vocab_size() + 62}
    tokens = {"image_token_index": image, "pad_token_id": pad, "text_config": text}
    _write(folder / "config.json", CONFIG | tokens)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}
    _write(folder / "generation_config.json", ends)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)).half()
    state = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    held = {old_name(name): weight for name, weight in state.items()} | dict(extra)
    where = {}
    for i in range(2):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        names = list(held)[i::2]
        save_file({n: held[n] for n in names}, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(names, shard)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return state


def _write(path, value):
    path.write_text(json.dumps(value, indent=2), "utf-8")
