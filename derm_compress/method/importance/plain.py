"""Output similarity the plain way, as the paper tells it; drafts.py is sooner there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from derm_compress.data import dialogue
from derm_compress.model import anatomy, prompts, removal
from derm_compress.model.generation import generate
from derm_compress.model.units import Unit


def output_similarity_plainly(
    model,
    processor,
    picture: np.ndarray,
    unit: Unit | int | str,
    embed: Callable[[str], np.ndarray],
    *,
    max_new_tokens: int,
) -> float:
    """Mean cosine over the study's questions about one picture [S, S, 3] (paper, Eqs. 2-5).

    The value of scoring.output_similarity is 1 minus this.
    """
    texts = [prompts.prompt(processor, kind) for kind in dialogue.QUESTIONS]
    pictures = np.stack([picture] * len(texts))
    inputs = prompts.prepare(processor, texts, pictures, anatomy.decoder(model).device)

    def answers() -> list[str]:
        return generate(model, processor, inputs, max_new_tokens=max_new_tokens)[0]

    whole = answers()  # y_i = M(x_i)
    with removal.without(model, [unit]):
        ablated = answers()  # y_i of the model without block l (Eq. 2)
    pairs = zip(map(embed, whole), map(embed, ablated), strict=True)  # e_i = S(y_i) (Eq. 3)
    return float(np.mean([e @ other for e, other in pairs]))  # Eqs. 4, 5
