"""A conversation as a model reads it, by its own chat template: to answer, calibrate and train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad as pad_right
from torch.nn.utils.rnn import pad_sequence

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.errors import DermError, first_line
from derm_compress.model.bounded import bounded

IGNORED = -100  # the label that the loss leaves out
TODAY = datetime(2024, 7, 26)  # for templates that tell the date: a prompt is the same every day


class Said(NamedTuple):
    """An answer's place in a text: from the blank before it to its last word, and to its end."""

    start: int
    words: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, with one image token for its picture, and where the answers are."""

    text: str
    answers: tuple[Said, ...]


def render(processor, turns: Sequence[tuple[str, str | None]], *, picture: bool = True) -> Rendered:
    """A conversation by the processor's chat template; None as the last answer asks for it.

    Each answer follows the prompt that asks for it, and ends with the template's own end token. A
    template without one, as LLaVA-1.5's, gets end-of-sequence in place of the blank that it puts
    there, or the model would never learn to stop.
    """
    told, before, text, answers = [], "", "", []
    for question, answer in turns:
        told.append(_message("user", question, picture=picture and not told))
        asked = _by_template(processor, told, add_generation_prompt=True)
        if not asked.startswith(before):
            raise DermError("chat template: it changes what was said when a conversation goes on")
        text += asked.removeprefix(before)
        if answer is None:
            break
        told.append(_message("assistant", answer))
        before = _by_template(processor, told)
        lead, behind = _around(answer, asked, before)
        end, after = _end(processor.tokenizer, behind)
        start, words = len(text), len(text) + len(lead + answer)
        text += lead + answer + end + after
        answers.append(Said(start, words, words + len(end)))
    return Rendered(text, tuple(answers))


def _message(role: str, text: str, *, picture: bool = False) -> dict:
    image = [{"type": "image"}] if picture else []
    return {"role": role, "content": [*image, {"type": "text", "text": text}]}


def _by_template(processor, told: list[dict], **how) -> str:
    if "strftime_now" in processor.chat_template:
        how["strftime_now"] = TODAY.strftime
    try:
        with bounded():
            return processor.apply_chat_template(told, **how)
    except Exception as error:  # a template is somebody else's program
        raise DermError(f"chat template: {first_line(error)}") from error


def _around(answer: str, asked: str, told: str) -> tuple[str, str]:
    """What a template puts between a prompt and its answer, and behind the answer."""
    if told.startswith(asked):
        lead, found, behind = told.removeprefix(asked).partition(answer)
    else:  # some write the prompt in another way once it is answered; what is asked counts
        (_, found, behind), lead = told.rpartition(answer), ""
    if not found:
        raise DermError("chat template: it does not keep an answer as it is")
    return lead, behind


def _end(tokenizer, behind: str) -> tuple[str, str]:
    """What ends an answer, of the text that a template puts behind it, and what is left of that."""
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    places = [behind.index(mark) + len(mark) for mark in marks if mark in behind]
    if not places:
        return behind.rstrip() + tokenizer.eos_token, ""
    return behind[: min(places)], behind[min(places) :]


def ends(processor) -> list[int]:
    """Ids of the tokens that end an answer: the chat template's own, and end-of-sequence."""
    made = render(processor, [("Why?", "So.")], picture=False)
    (said,) = made.answers
    ids = processor.tokenizer(made.text[said.words : said.end], add_special_tokens=False)
    found = [ids["input_ids"][-1], processor.tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(found) if token is not None]


def specials(processor, text: str) -> dict[str, bool]:
    """How a text is tokenized: one that begins with the first token needs no other."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": not (first and text.startswith(first))}


def prompt(processor, kind: str, *, text_only: bool = False) -> str:
    """The prompt of one of the study's questions, as `ask`."""
    return ask(processor, dialogue.question(kind), text_only=text_only)


def ask(processor, question: str, *, text_only: bool = False) -> str:
    """The prompt of a question, the image before it unless `text_only`."""
    return render(processor, [(question, None)], picture=not text_only).text


def prepare(
    processor, texts: Sequence[str], images: np.ndarray | None, device
) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, padded on the left for new tokens to follow; images [n, S, S, 3]."""
    processor.tokenizer.padding_side = "left"
    how = {"return_tensors": "pt", "padding": True} | specials(processor, texts[0])
    pictures = None if images is None else list(images)
    return processor(text=list(texts), images=pictures, **how).to(device)


def calibration_batches(
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    batch_size: int,
    device,
    text_only: bool = False,
    answer_weight: float = 1.0,
) -> Iterator[dict]:
    """Prompts with image and reference answer: what statistics are collected on.

    text_only leaves the image out. An answer_weight other than 1 adds `token_weights`: that for the
    answers' tokens.
    """
    asked = [(item, kind) for item in items for kind in dialogue.QUESTIONS]
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        texts, begins = [], []
        for item, kind in part:
            turn = dialogue.question(kind), dialogue.reference(item.disease, item.facts, kind)
            made = render(processor, [turn], picture=not text_only)
            (said,) = made.answers
            texts.append(made.text[: said.words])
            begins.append(said.start)
        pictures = None if text_only else images[[item.row for item, _ in part]]
        batch = prepare(processor, texts, pictures, device)
        if answer_weight != 1:
            shape = batch["input_ids"].shape
            batch["token_weights"] = torch.ones(shape, device=device)
            for weights, text, begin in zip(batch["token_weights"], texts, begins, strict=True):
                length = sum(end > begin for _, end in _places(processor, text))
                weights[len(weights) - length :] = answer_weight
        yield batch


def _places(processor, text: str) -> list[tuple[int, int]]:
    how = {"return_offsets_mapping": True} | specials(processor, text)
    return processor.tokenizer(text, **how)["offset_mapping"]


def encode(
    processor, turns: Sequence[tuple[str, str]], *, image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of one conversation, and labels on its answers and their end tokens alone.

    image_tokens: that its picture takes, before all answers; 0 without a picture.
    """
    made = render(processor, turns, picture=image_tokens > 0)
    text, more = made.text, 0
    if image_tokens:
        pictures = processor.image_token * image_tokens
        text = text.replace(processor.image_token, pictures, 1)
        more = len(text) - len(made.text)
    coded = processor.tokenizer(text, return_offsets_mapping=True, **specials(processor, text))
    ids = torch.tensor(coded["input_ids"])
    labels = torch.full_like(ids, IGNORED)
    for said in made.answers:
        start, end = said.start + more, said.end + more
        for i, (first, after) in enumerate(coded["offset_mapping"]):
            if first < start < after:
                raise DermError("chat template: a token joins a prompt's end with the answer")
            if start <= first < min(after, end):  # an end token may take in blanks behind it
                labels[i] = ids[i]
    return ids, labels


def collate(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], *, pad: int, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, labels and attention_mask, each [batch, longest].

    multiple: of so many tokens is its width.
    """
    ids, labels = zip(*pieces, strict=True)

    def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        made = pad_sequence(rows, batch_first=True, padding_value=value)
        return pad_right(made, (0, -made.shape[1] % multiple), value=value)

    return {
        "input_ids": padded(ids, pad),
        "labels": padded(labels, IGNORED),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
    }
