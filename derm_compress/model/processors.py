"""Processors: what one leaves out is taken from the model's config, what is wrong is refused."""

from __future__ import annotations

import json

import numpy as np

from derm_compress.data import dialogue
from derm_compress.errors import DermError, first_line
from derm_compress.model import anatomy, prompts
from derm_compress.model.hf import AutoProcessor, LlavaProcessor

JOINED = """\
{%- set told = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(text="") -%}
{%- for part in message["content"] -%}
{%- set said.text = said.text + (part["text"] if part["type"] == "text" else IMAGE) -%}
{%- endfor -%}
{%- set told.messages = told.messages + [{"role": message["role"], "content": said.text}] -%}
{%- endfor -%}
{%- set messages = told.messages -%}
"""  # before a language model's template, which takes texts, not parts


def read_processor(name: str, source: str, config) -> LlavaProcessor:
    """The processor of a model folder or hub id, whole; DermError for one that does not fit."""
    try:
        processor = AutoProcessor.from_pretrained(source)
        if not isinstance(processor, LlavaProcessor):
            raise DermError(f"it has a {type(processor).__name__}, not a LlavaProcessor")
        _complete(processor, config)
        _check_tokens(processor, config)
        _check_template(processor)
        _check_pictures(processor, config)
    except DermError as error:
        raise DermError(f"model {name}: {error}") from error
    except Exception as error:  # other people's files hold anything
        said = f"its processor cannot be used: {first_line(error)}"
        raise DermError(f"model {name}: {said}") from error
    return processor


def _complete(processor: LlavaProcessor, config) -> None:
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise DermError("its tokenizer has no eos_token: name it in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is neither read nor learnt
    template = processor.chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise DermError("it has no chat template: put a chat_template.jinja into its folder")
    processor.chat_template = template
    if processor.patch_size is None:
        vision = config.vision_config
        processor.patch_size = vision.patch_size
        processor.num_additional_image_tokens = anatomy.TOWERS[vision.model_type]
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy


def _check_tokens(processor: LlavaProcessor, config) -> None:
    """The image token is one, and the same to tokenizer and config; every token has a row."""
    tokenizer, image = processor.tokenizer, processor.image_token
    ids = tokenizer(image, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DermError(f"its tokenizer splits {image}: add it as a special token")
    if ids[0] != config.image_token_id:
        raise DermError(
            f"{image} is token {ids[0]} to its tokenizer and {config.image_token_id} to its "
            "config: mend image_token_index in config.json"
        )
    rows = config.text_config.vocab_size
    beyond = [token for token in (*ids, tokenizer.pad_token_id) if token >= rows]
    if beyond:
        raise DermError(f"token {beyond[0]} of its tokenizer has no row among {rows} embeddings")


def _check_template(processor: LlavaProcessor) -> None:
    """A conversation shows its picture, and ends each answer with one token."""
    if not _shows_picture(processor):
        processor.chat_template = in_parts(processor.chat_template, processor.image_token)
        if not _shows_picture(processor):
            said = "takes neither parts nor texts, or leaves out what is asked"
            raise DermError(f"its chat template {said}: mend chat_template.jinja")
    made = prompts.render(processor, [_turn("name")])
    (said,) = made.answers
    end = made.text[said.words : said.end].strip()
    if len(processor.tokenizer(end, add_special_tokens=False)["input_ids"]) != 1:
        raise DermError(
            f"its chat template ends an answer with {end!r}, which its tokenizer splits: "
            "add it as a special token"
        )


def in_parts(template: str, image: str) -> str:
    """A template of texts as one of parts, which shows a picture on a line of its own."""
    return JOINED.replace("IMAGE", json.dumps(f"{image}\n")) + template


def _turn(kind: str) -> tuple[str, str]:
    return dialogue.question(kind), dialogue.reference(dialogue.diseases()[0], {}, kind)


def _shows_picture(processor: LlavaProcessor) -> bool:
    question, _ = _turn("name")
    try:
        text = prompts.ask(processor, question)
    except DermError:
        return False
    return text.count(processor.image_token) == 1 and question in text


def _check_pictures(processor: LlavaProcessor, config) -> None:
    """A picture becomes what the tower reads, and as many tokens as it gives; asked as answered."""
    side, given = config.vision_config.image_size, anatomy.image_tokens(config)
    turns = [_turn("name"), _turn("treatment")]
    blank = np.zeros((1, side, side, 3), np.uint8)
    inputs = prompts.prepare(processor, [prompts.ask(processor, turns[0][0])], blank, "cpu")
    found = tuple(inputs["pixel_values"].shape[-2:])
    if found != (side, side):
        raise DermError(
            f"its processor makes pictures of {found[0]} x {found[1]} px, its tower reads {side}: "
            "mend size or crop_size in its processor's config"
        )
    asked = inputs["input_ids"][0]
    expanded = int((asked == config.image_token_id).sum())
    if expanded != given:
        raise DermError(
            f"its processor expands to {expanded} tokens a picture, the model gives {given}: "
            "mend patch_size, crop_size or num_additional_image_tokens (1 for LLaVA-1.5) in its "
            "processor's config"
        )
    ids, labels = prompts.encode(processor, turns, image_tokens=given)
    first = int((labels != prompts.IGNORED).int().argmax())
    if ids[:first].tolist() != asked.tolist():
        raise DermError("its tokenizer reads a prompt in another way once it is answered")


def check_picture_size(processor: LlavaProcessor | None, images) -> None:
    """Refuse pictures [n, S, S, 3] that the processor would resize: stage 01 prepares them once."""
    if processor is None:
        return
    made = processor.image_processor(list(images[:1]), return_tensors="pt")["pixel_values"]
    wanted, found = made.shape[-1], images.shape[1]
    if wanted != found:
        raise DermError(
            f"pictures of {found} px, but the model reads {wanted} px: set image_size: {wanted}"
        )
