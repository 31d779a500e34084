"""Small random LLaVAs of every family that is tried, as model folders, each with its own quirks."""

import json
from dataclasses import dataclass

import published_llava
import torch
from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from derm_compress.model.loading import TINY

SIZE, PATCH, BLOCKS = 56, 14, 3
PARTS = (  # the text of a message, its picture first
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'] | upper }}: " + PARTS + "{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# as llava-interleave-qwen's: a blank behind the role, but not where an answer is asked for
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} \n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] " + PARTS + " [/INST]"
    "{% else %} " + PARTS + "{{ eos_token }}{% endif %}{% endfor %}"
)
# of a language model: takes texts, not parts, and tells the date
LLAMA_3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ strftime_now('%d %b %Y') }}<|eot_id|>"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n" + PARTS + "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CLIP, SIGLIP = (
    {"model_type": "clip_vision_model", "projection_dim": 24},
    {"model_type": "siglip_vision_model", "vision_use_head": False},
)


@dataclass(frozen=True)
class Family:
    """One kind of LLaVA: its decoder's config, tower, strategy, template, and what is odd in it."""

    name: str
    decoder: dict
    tower: dict
    strategy: str
    template: str
    tokens: tuple[str, ...] = ()  # that its template needs
    bos: str | None = "<s>"
    eos: str = "</s>"
    pad: str | None = "<pad>"
    plain_processor: bool = True  # says how many tokens a picture takes
    notes: str = ""

    @property
    def model_type(self):
        return self.decoder["model_type"]


PLAIN = Family("LLaVA", {"model_type": "llama"}, CLIP, "default", VICUNA)
PUBLISHED = Family(
    "LLaVA-1.5",
    {"model_type": "llama"},
    CLIP,
    "default",
    published_llava.TEMPLATE,
    notes="the published layout: old names, pieces of words with blanks, no end in the template",
)
FAMILIES = [
    PUBLISHED,
    Family("LLaVA with Llama 3", {"model_type": "llama", "num_key_value_heads": 2}, CLIP, "full",
           LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), pad=None,
           notes="grouped heads, no pad token, a template for texts alone"),
    Family("LLaVA with Mistral", {"model_type": "mistral", "num_key_value_heads": 2}, CLIP,
           "default", MISTRAL, ("[INST]", "[/INST]"), plain_processor=False,
           notes="grouped heads, a processor without patch_size"),
    Family("LLaVA with Qwen2", {"model_type": "qwen2", "num_key_value_heads": 2,
           "tie_word_embeddings": True}, SIGLIP, "full", CHATML, ("<|im_start|>", "<|im_end|>"),
           bos=None, eos="<|im_end|>", notes="grouped heads, biases, tied embeddings"),
    Family("LLaVA with Phi-3", {"model_type": "phi3"}, SIGLIP, "default", PHI_3,
           ("<|user|>", "<|assistant|>", "<|end|>"), bos=None, pad=None,
           notes="fused projections, its end token is not end-of-sequence"),
]  # fmt: skip


def tokenizer(family):
    """The tiny model's pieces of words, with the tokens that a template needs."""
    made = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    made.add_special_tokens([AddedToken(token, special=True) for token in family.tokens])
    if family.bos is None:
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    words = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    words = {name: word for name, word in words.items() if word}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **words)


def processor(family):
    """What the family's folder holds; without `plain_processor` not even a patch size."""
    if family.tower is CLIP:
        sides = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        images = CLIPImageProcessorPil(**sides)
    else:
        images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    told = {"patch_size": PATCH, "vision_feature_select_strategy": family.strategy}
    told |= {"num_additional_image_tokens": int(family.tower is CLIP)}
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(family),
        chat_template=family.template,
        **told if family.plain_processor else {},
    )


def write(family, folder):
    """The family's model folder; its weights are the same every time."""
    if family is PUBLISHED:
        published_llava.write(folder)
        return folder
    made = processor(family)
    made.save_pretrained(folder)
    rows = len(made.tokenizer) + 5
    sizes = {"hidden_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    text = {"vocab_size": rows, "intermediate_size": 128, "initializer_range": 0.1}
    text |= sizes | {"max_position_embeddings": 2048, "pad_token_id": None} | family.decoder
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH} | family.tower
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=4,
        vision_feature_select_strategy=family.strategy,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.bias"):  # else all 0
                weight.normal_()
    model.save_pretrained(folder)
    return folder


def change(folder, file, **told):
    """Writes other values into one of a folder's JSON files; None takes a key out."""
    path = folder / file
    found = json.loads(path.read_text("utf-8")) | told
    found = {key: value for key, value in found.items() if value is not None}
    path.write_text(json.dumps(found), "utf-8")


def table():
    """The README's table of what was tried."""
    lines = ["| decoder | tower | features | what is odd |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        tower = "CLIP" if family.tower is CLIP else "SigLIP"
        lines.append(f"| {family.model_type} | {tower} | {family.strategy} | {family.notes} |")
    return "\n".join(lines)
