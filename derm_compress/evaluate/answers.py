"""Answers to the study's questions, greedy and batched, each kept: of a model, of variants,
unseeing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.evaluate import schema
from derm_compress.evaluate.dealing import Share, deal
from derm_compress.evaluate.judges.rubric import score_by_rubric
from derm_compress.files import Journal
from derm_compress.method.iterate import each_model
from derm_compress.model import anatomy, devices, loading, memory, oom, shapes
from derm_compress.model import variants as variants_of
from derm_compress.model.reading import Prompts
from derm_compress.model.variants import ORIGINAL
from derm_compress.model.writing import greedy_answers
from derm_compress.progress import track


def answer(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    variant: str,
    batch_size: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """One row per item and question (schema.ANSWER).

    They come in rounds of `batch_size` pictures, each by itself: a neighbour may move a last digit,
    and so a word where two nearly tie. A round whose answers are all in the journal is not asked
    again, another is asked whole.

    A model without values says nothing: no row.
    """
    if not anatomy.has_values(model):
        return schema.frame([], schema.ANSWER)
    size = {"batch": batch_size, "new_tokens": max_new_tokens}
    if devices.too_small(model.config, model.device, **size):
        devices.spread(model)
    journal = journal or Journal()
    how = {"images": images, "max_new_tokens": max_new_tokens}
    replies = partial(picture_replies, model, processor, **how)
    rounds = []
    for start in range(0, len(items), batch_size):
        some = items[start : start + batch_size]
        asked = {
            f"{variant} {item.id} {kind}": (item, kind)
            for kind in dialogue.QUESTIONS
            for item in some
        }
        if not journal.done.keys() >= asked.keys():
            rounds.append((some, asked))
    what = f"answers of {variant}"
    for some, asked in track(rounds, what):
        batch_size, told = oom.halved(partial(_of_size, replies, some), batch_size, what)
        for key, (item, kind) in asked.items():
            if key not in journal.done:
                row = {"variant": variant} | schema.asked(item, kind) | told[item.id, kind]
                journal.add(key, row)
    return answered(journal, variant, items)


def answered(journal: Journal, variant: str, items: Sequence[Item]) -> pd.DataFrame:
    """A variant's answers, which are all in the journal."""
    keys = [f"{variant} {item.id} {kind}" for kind in dialogue.QUESTIONS for item in items]
    return schema.frame([journal.done[key] for key in keys], schema.ANSWER)


def scored(journal: Journal, variants: pd.DataFrame, items: Sequence[Item], device: str):
    """All variants' answers from the journal, scored by the rubric; of shapes alone, none."""
    names = () if device == anatomy.META else variants.variant
    frames = [answered(journal, name, items) for name in names]
    return score_by_rubric(schema.together(frames, schema.ANSWER))


def picture_replies(
    model, processor, items: Sequence[Item], images: np.ndarray, *, batch_size, max_new_tokens
) -> dict[tuple[str, str], dict]:
    """{(item, question): answer, tokens, stopped}; prompts are read once."""
    questions = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
    prompts = Prompts.of(processor, images[0], questions, anatomy.decoder(model).device)
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    found = {}
    for said in greedy_answers(model, prompts, items, images, **how):
        text = processor.tokenizer.decode(said.tokens, skip_special_tokens=True).strip()
        stopped = said.tokens[-1] in prompts.ends
        told = {"answer": text, "tokens": len(said.tokens), "stopped": stopped}
        found[said.item, said.question] = told
    return found


def _of_size(replies: Callable, items: Sequence[Item], batch_size: int) -> tuple[int, dict]:
    return batch_size, replies(items, batch_size=batch_size)


def answer_variants(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    max_new_tokens: int,
    journal: Journal | None = None,
    quantize: Callable | None = None,
) -> pd.DataFrame:
    """Answers of every variant to all questions about the items, scored by the rubric.

    quantize: as assemble.materialize takes it, for quantized ones.
    """
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    journal = journal or Journal()
    work = partial(answer_share, variants, store=store, quantize=quantize, **how)
    deal(work, variants, items, images, device=device, journal=journal, **how)
    return scored(journal, variants, items, device)


def answer_share(
    variants: pd.DataFrame, share: Share, *, journal: Journal, store, quantize, **how
) -> None:
    """answer() of every variant about a share's pictures, into the journal."""
    read = {"what": "variants answered", "quantize": quantize} | share.place
    for turn in each_model(variants, store, **read):
        asked = {"variant": turn.variant, "journal": journal} | how
        answer(turn.model, turn.processor, share.items, share.images, **asked)


def answer_controls(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    seed: int,
    store,
    device: str,
    batch_size: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """The original on blank pictures and on those of other diseases: the score without seeing."""
    how = {"store": store, "device": device, "batch_size": batch_size}
    how |= {"max_new_tokens": max_new_tokens, "journal": journal}
    original = variants_of.named(variants, [ORIGINAL])
    blank = np.full_like(images[:1], int(images.mean()))
    unseen = {"blank": ([0] * len(items), blank), "shuffled": (shuffled_rows(items, seed), images)}
    frames = []
    for name, (rows, pictures) in unseen.items():
        moved = [dataclasses.replace(item, row=row) for item, row in zip(items, rows, strict=True)]
        control = original.assign(variant=name)
        frames.append(answer_variants(control, moved, pictures, **how))
    return pd.concat(frames, ignore_index=True)


def shuffled_rows(items: Sequence[Item], seed: int) -> list[int]:
    """For each item the picture of another one, of another disease where there is one."""
    rng = np.random.default_rng([seed, 11])
    rows = []
    for item in items:
        others = [other for other in items if other.disease != item.disease]
        others = others or [other for other in items if other.row != item.row]
        rows.append(others[rng.integers(len(others))].row if others else item.row)
    return rows


def table_variants(variants: pd.DataFrame, choice: dict) -> pd.DataFrame:
    """The variants of Tables 4 and 5, the healed control beside them, and what was trained alike
    and may have the same bytes: the control at fewer bits, other depths at 4."""
    plain = variants_of.roles(variants, choice)
    healed = variants_of.roles(variants, choice, healed=True)
    pruned, full = plain["operating"], healed["operating"]
    wanted = [(source, "") for source in (ORIGINAL, pruned, full, healed["unpruned"])]
    wanted += [(source, "awq") for source in (ORIGINAL, pruned, full)]
    wanted += [(full, quantizer) for quantizer in ("bitsandbytes", "rtn", "rtn_symmetric")]
    wanted += [(healed.get("rival"), "awq")]
    four = variants[variants.bits.eq(4) | variants.quantizer.eq("")]
    frames = [four[four.source.eq(source) & four.quantizer.eq(name)] for source, name in wanted]
    alike = variants.healed & variants.quantizer.eq("awq") & variants.bits.isin([2, 3, 4])
    alike &= variants.criterion.isin(["", choice["criterion"]]) & variants.sft_seed.eq(0)
    frames.append(variants[alike & (variants.bits.eq(4) | variants.source.eq(healed["unpruned"]))])
    return pd.concat(frames).drop_duplicates("variant", ignore_index=True)


def plan_memory(variants: pd.DataFrame) -> pd.DataFrame:
    """memory.plan_variants of the original's own shapes, and of LLaVA's at 7B."""
    config = loading.config_of(variants_of.recipe_of(variants, ORIGINAL).base)
    return memory.plan_variants(variants, shapes.architecture(config), shapes.llava_7b())
