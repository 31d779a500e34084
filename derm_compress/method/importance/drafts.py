"""What a model says without one of its parts: by reading, not by writing.

Greedy decoding makes the full model's answer a draft. One reading of prompt and draft without the
part tells where it first disagrees: nowhere, and the answer is the same; else it is written from
there on, rows of all parts in one batch with a gate for each row and sublayer. In fp32 the answers
are those of removing the part and generating anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from derm_compress.data.items import Item
from derm_compress.model.reading import Prompts
from derm_compress.model.units import Unit
from derm_compress.model.writing import Answer, Writer, read_without


@torch.inference_mode()
def ablated_answers(
    model,
    prompts: Prompts,
    items: Sequence[Item],
    images: np.ndarray,
    units: Iterable[Unit | int | str],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[Answer]:
    """Greedy answers of the full model (unit None) and without each unit, as they are finished.

    The items' prompts are read at once, without a unit half of them; up to `batch_size` answers
    are written at once.
    """
    units, drafts = sorted(map(Unit.of, units), reverse=True), {}
    lines = min(batch_size, len(items) * len(prompts.rest) * max(1, len(units)))
    writer = Writer(model, prompts, lines=lines, max_new_tokens=max_new_tokens)
    whole = read_without(items, images, {}, (), writer)
    for answer in itertools.chain(whole, writer.flush()):
        drafts[answer.item, answer.question] = answer.tokens
        yield answer
    # a reading leaves about half of its rows to write, and holds most of the memory
    half = (len(items) + 1) // 2
    for few in (items[:half], items[half:]):
        if few and units:
            yield from read_without(few, images, drafts, units, writer)
    yield from writer.flush()
