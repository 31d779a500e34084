"""Scores in percent with intervals, paired differences with p-values.

Images are the clusters throughout.

`answers` are frames of evaluate.schema, mostly of one variant: `item` (the image), `question`,
`score` (1 to 4, or null where the judge's reply could not be read). Answers without a score are
counted by `unscored` and left out of every mean.
"""

import functools
from typing import NamedTuple

import numpy as np
import pandas as pd

from derm_compress.errors import DermError

SCALE = (1, 4)  # the judge's lowest and highest mark; percent is mean / 4 * 100, so the floor is 25
LEVEL = 0.95
TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
DRAWS, PERMUTATIONS, SEED = 2000, 10_000, 0  # of a bootstrap, of a sign-flip test, of both


class Score(NamedTuple):
    """Percent, its 95 % interval, and how many scored answers are behind it (nan, 0 for none)."""

    score: float
    lo: float
    hi: float
    n: int


class Difference(NamedTuple):
    """a - b in percentage points, 95 % interval, two-sided p, numbers of pairs and of images."""

    difference: float
    lo: float
    hi: float
    p: float
    n: int
    images: int


class Recovery(NamedTuple):
    """Points that SFT gives back net of the control's gain, points lost, their ratio in percent."""

    net: float
    loss: float
    share: float
    lo: float
    hi: float
    n: int


class Kappa(NamedTuple):
    """Weighted kappa (1: same marks, 0: chance), its 95 % interval, numbers of pairs and images."""

    kappa: float
    lo: float
    hi: float
    n: int
    images: int


def percent(mean_score: float) -> float:
    """A mean mark of 1 to 4 as the paper's percentage, mean / 4 * 100: the floor is 25, not 0."""
    return mean_score / SCALE[1] * 100


FLOOR = percent(SCALE[0])


def unscored(answers: pd.DataFrame) -> int:
    """How many answers the judge gave no score (judge errors)."""
    return int(answers["score"].isna().sum())


def depth_scores(answers: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """Score in percent of each variant with its removed blocks: what a depth is chosen from."""
    means = percent(answers.groupby("variant").score.mean())
    return variants[["variant", "blocks_removed"]].assign(score=variants.variant.map(means))


def score_interval(answers: pd.DataFrame, *, n_boot: int = DRAWS) -> Score:
    """Mean score in percent with a 95 % percentile bootstrap over images.

    A drawn image brings all its answers, so that questions about one picture count as the dependent
    observations they are. Raises DermError for a score outside 1 to 4.
    """
    scored = _scored(answers)
    if scored.empty:
        return Score(np.nan, np.nan, np.nan, 0)
    sums, counts = _by_image(scored["item"], scored["score"])
    lo, hi = _bootstrap(sums, counts, n_boot=n_boot)
    return Score(percent(sums.sum() / counts.sum()), percent(lo), percent(hi), len(scored))


def score_table(answers: pd.DataFrame, by: list[str], *, n_boot: int = DRAWS) -> pd.DataFrame:
    """One row per group of `by`, in order of appearance: score, score_lo, score_hi, n, unscored."""
    rows = []
    for key, group in answers.groupby(by, sort=False, dropna=False):
        estimate = score_interval(group, n_boot=n_boot)
        rows.append((*key, *estimate, unscored(group)))
    return pd.DataFrame(rows, columns=[*by, "score", "score_lo", "score_hi", "n", "unscored"])


def paired_difference(
    a: pd.DataFrame, b: pd.DataFrame, *, n_permutations: int = PERMUTATIONS
) -> Difference:
    """Score of a minus that of b where both answered, with interval and sign-flip p-value.

    a, b: answers of one variant each, paired by item and question; pairs with a missing score are
    left out. Both interval and permutation treat images as the units. Raises DermError where a pair
    is not unique.
    """
    for answers in (a, b):
        if answers.duplicated(["item", "question"]).any():
            raise DermError(
                "paired_difference: several answers to one question; pass one variant's answers"
            )
    pairs = _scored(a).merge(_scored(b), on=["item", "question"], suffixes=("_a", "_b"))
    if pairs.empty:
        return Difference(np.nan, np.nan, np.nan, np.nan, 0, 0)
    sums, counts = _by_image(pairs["item"], pairs["score_a"] - pairs["score_b"])
    lo, hi = _bootstrap(sums, counts)
    p = sign_flip_p(sums, n_permutations=n_permutations)
    difference = sums.sum() / counts.sum()
    return Difference(percent(difference), percent(lo), percent(hi), p, len(pairs), len(sums))


def by_image_difference(a: pd.DataFrame, b: pd.DataFrame) -> pd.Series:
    """Mean score of a minus that of b in points by image, over the questions scored in both."""
    pairs = _scored(a).merge(_scored(b), on=["item", "question"], suffixes=("_a", "_b"))
    return percent(
        (pairs["score_a"] - pairs["score_b"]).groupby(pairs["item"].to_numpy(), sort=True).mean()
    )


def share_interval(items: pd.Series, values: pd.Series) -> Score:
    """Mean of values (0 to 1, null left out) in percent, 95 % bootstrap over images, and number."""
    known = values.notna()
    if not known.any():
        return Score(np.nan, np.nan, np.nan, 0)
    sums, counts = _by_image(items[known], values[known].astype(float))
    lo, hi = _bootstrap(sums, counts)
    return Score(100 * sums.sum() / counts.sum(), 100 * lo, 100 * hi, int(known.sum()))


def recovery(original, pruned, healed, control, *, n_boot: int = DRAWS) -> Recovery:
    """((healed - pruned) - (control - original)) / (original - pruned), drawn together by image.

    Each argument: one variant's answers; only questions scored in all four count. Without a loss
    there is no share (nan), and no interval where more draws than one tail holds have no loss.
    """
    marks = [
        _scored(answers).set_index(["item", "question"]).score
        for answers in (original, pruned, healed, control)
    ]
    shared = pd.concat(marks, axis=1, join="inner")
    if shared.empty:
        return Recovery(*[np.nan] * 5, 0)
    items = shared.index.get_level_values("item")
    whole, cut, back, extra = shared.to_numpy().T
    net, counts = _by_image(items, pd.Series(back - cut - extra + whole))
    loss, _ = _by_image(items, pd.Series(whole - cut))
    drawn = _draws(len(net), n_boot=n_boot)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = 100 * np.where(drawn @ loss > 0, drawn @ net / (drawn @ loss), np.nan)
    share = 100 * net.sum() / loss.sum() if loss.sum() > 0 else np.nan
    points = [percent(sums.sum() / counts.sum()) for sums in (net, loss)]
    return Recovery(*points, share, *_known_tails(share, ratios), len(items))


def weighted_kappa(pairs: pd.DataFrame, one: str, other: str) -> Kappa:
    """Agreement of two judges on the same answers: quadratic weighted kappa, bootstrap by `item`.

    1 - mean((a - b)^2) / mean((a_i - b_j)^2 over all i, j), which is Cohen's kappa with quadratic
    weights for whole marks and holds for marks between them. Pairs with a null are left out; two
    judges that both give one and the same mark throughout have no kappa (nan), and no interval
    where more draws than one tail holds are such.
    """
    kept = pairs[pairs[one].notna() & pairs[other].notna()]
    if kept.empty:
        return Kappa(np.nan, np.nan, np.nan, 0, 0)
    a, b = kept[one].astype(float), kept[other].astype(float)
    sums = [_by_image(kept["item"], values) for values in (a, b, a**2, b**2, (a - b) ** 2)]
    table = np.stack([sums[0][1], *(total for total, _ in sums)])  # [count and five sums, images]
    drawn = _kappa(table @ _draws(table.shape[1]).T)
    kappa = float(_kappa(table.sum(1)))
    return Kappa(kappa, *_known_tails(kappa, drawn), len(kept), table.shape[1])


def _kappa(table: np.ndarray) -> np.ndarray:
    count, a, b, aa, bb, apart = table
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = (aa + bb) / count - 2 * a * b / count**2
        return np.where(chance > 1e-12, 1 - apart / count / chance, np.nan)


def sign_flip_p(sums: np.ndarray, *, n_permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of "a and b are exchangeable within each image".

    sums: [images] summed differences. Exact over all 2^images sign patterns where these are no more
    than n_permutations, else random patterns with the observed one counted among them, so that p is
    never 0.
    """
    images = len(sums)
    exact = images <= np.log2(n_permutations)
    if exact:
        bits = np.arange(2**images)[:, None] >> np.arange(images) & 1
    else:
        bits = np.random.default_rng(SEED).integers(0, 2, (n_permutations, images), dtype=np.int8)
    flipped = np.abs((1 - 2 * bits) @ sums)
    extreme = int((flipped >= abs(sums.sum()) - 1e-9).sum())
    return extreme / len(bits) if exact else (extreme + 1) / (len(bits) + 1)


def holm(p) -> np.ndarray:
    """p-values corrected for their number (Holm 1979), in the same order; nan stays, uncounted."""
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan sorts last
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def mean_intervals(marks: pd.DataFrame) -> pd.DataFrame:
    """Percent with a 95 % bootstrap over images for each column, the same images drawn for all.

    marks: [answers, columns], marks or their differences, indexed by item (the image) and question;
    NaN is left out. Returns one row a column: mean, lo, hi (NaN where nothing is scored).
    """
    by_image = marks.groupby(level=0, sort=True)
    sums, counts = by_image.sum().to_numpy(float), by_image.count().to_numpy()
    drawn = _draws(len(sums))
    with np.errstate(invalid="ignore"):
        means = percent(sums.sum(0) / counts.sum(0))
        lo, hi = percent(np.nanquantile((drawn @ sums) / (drawn @ counts), TAILS, axis=0))
    return pd.DataFrame({"mean": means, "lo": lo, "hi": hi}, index=marks.columns)


def mean_interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean of one value an image, and its 95 % bootstrap over them."""
    known = values.dropna().to_numpy(float)
    return known.mean(), *_tails(_draws(len(known)) @ known / len(known))


def ratio_interval(part: pd.Series, whole: pd.Series) -> tuple[float, float, float]:
    """Mean of one part an image in percent of the wholes' mean, 95 % bootstrap over images.

    No interval where more draws than one tail holds have no whole.
    """
    drawn = _draws(len(part))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 100 * np.divide(part.mean(), whole.mean())
        wholes = drawn @ whole.to_numpy()
        ratios = np.where(wholes > 0, 100 * (drawn @ part.to_numpy()) / wholes, np.nan)
    return share, *_known_tails(share, ratios)


def crossed_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap of the mean of [images, draws]: of what other images and other draws give."""
    images, draws = values.shape
    others = np.random.default_rng([SEED, 1]).integers(0, draws, (DRAWS, draws))
    by_draw = _draws(images) @ values / images  # [DRAWS, draws]
    return _tails(np.take_along_axis(by_draw, others, axis=1).mean(1))


def _scored(answers: pd.DataFrame) -> pd.DataFrame:
    scored = answers.loc[answers["score"].notna(), ["item", "question", "score"]].astype(
        {"score": float}
    )
    if not scored["score"].between(*SCALE).all():
        raise DermError(
            f"scores: a judge's score lies within {SCALE[0]} to {SCALE[1]}, or is null for none"
        )
    return scored


def _by_image(items: pd.Series, values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """(sum, count) of values per image, [images] each, images in order of name."""
    grouped = values.groupby(items.to_numpy(), sort=True)
    return grouped.sum().to_numpy(float), grouped.size().to_numpy()


def _bootstrap(sums: np.ndarray, counts: np.ndarray, *, n_boot: int = DRAWS) -> tuple[float, float]:
    """Percentile interval of total sum / total count when images are drawn with replacement."""
    drawn = _draws(len(sums), n_boot=n_boot)
    return _tails((drawn @ sums) / (drawn @ counts))


@functools.lru_cache(maxsize=4)
def _draws(images: int, *, n_boot: int = DRAWS) -> np.ndarray:
    """How often each image is drawn, [n_boot, images], read-only."""
    drawn = np.random.default_rng(SEED).multinomial(
        images, np.full(images, 1 / images), size=n_boot
    )
    drawn.flags.writeable = False
    return drawn


def _known_tails(point: float, drawn: np.ndarray) -> tuple[float, float]:
    """_tails of the draws that have a value; nan without a point, or if a tail's worth has none."""
    unknown = np.isnan(drawn)
    if np.isnan(point) or unknown.mean() > TAILS[0]:
        return np.nan, np.nan
    return _tails(drawn[~unknown])


def _tails(values: np.ndarray) -> tuple[float, float]:
    lo, hi = np.quantile(values, TAILS)
    return float(lo), float(hi)
