"""Procedural skin pictures with known attributes: a source without patients, copyright or downloads.

Six attributes are drawn so that a small vision tower can see them; each of the eight diseases has its own, overlapping
distribution over them (`DISEASES`), so that no picture is certain. A teaching device, not a model of dermatology.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from derm_compress.data.items import Dataset, Item
from derm_compress.progress import track

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "count": ("single", "few", "many"),
    "size": ("small", "large"),
    "colour": ("red", "pink", "brown", "black", "violet"),
    "border": ("sharp", "blurred", "rolled", "irregular"),
    "surface": ("smooth", "scaly", "shiny", "crusted", "warty"),
    "site": ("face", "trunk", "limb", "hand"),
}
# P(attribute | disease), up to NOISE: the share of pictures in which an attribute follows no rule at all.
DISEASES: dict[str, dict[str, dict[str, float]]] = {
    "rosacea": {
        "count": {"many": 0.7, "few": 0.3},
        "size": {"small": 0.9, "large": 0.1},
        "colour": {"red": 0.7, "pink": 0.3},
        "border": {"blurred": 0.9, "sharp": 0.1},
        "surface": {"smooth": 0.7, "shiny": 0.2, "scaly": 0.1},
        "site": {"face": 1.0},
    },
    "actinic keratosis": {
        "count": {"few": 0.6, "single": 0.3, "many": 0.1},
        "size": {"small": 0.9, "large": 0.1},
        "colour": {"pink": 0.5, "red": 0.3, "brown": 0.2},
        "border": {"blurred": 0.6, "sharp": 0.2, "irregular": 0.2},
        "surface": {"scaly": 0.7, "crusted": 0.3},
        "site": {"face": 0.5, "hand": 0.5},
    },
    "basal cell carcinoma": {
        "count": {"single": 1.0},
        "size": {"small": 0.4, "large": 0.6},
        "colour": {"pink": 0.7, "red": 0.3},
        "border": {"rolled": 0.9, "irregular": 0.1},
        "surface": {"shiny": 0.6, "crusted": 0.3, "smooth": 0.1},
        "site": {"face": 0.7, "trunk": 0.3},
    },
    "dermatitis": {
        "count": {"few": 0.5, "many": 0.5},
        "size": {"large": 0.8, "small": 0.2},
        "colour": {"red": 0.6, "pink": 0.4},
        "border": {"blurred": 0.9, "irregular": 0.1},
        "surface": {"scaly": 0.4, "crusted": 0.4, "smooth": 0.2},
        "site": {"limb": 0.5, "hand": 0.5},
    },
    "melanoma": {
        "count": {"single": 1.0},
        "size": {"large": 0.7, "small": 0.3},
        "colour": {"black": 0.7, "brown": 0.3},
        "border": {"irregular": 0.9, "blurred": 0.1},
        "surface": {"smooth": 0.7, "crusted": 0.2, "shiny": 0.1},
        "site": {"trunk": 0.5, "limb": 0.5},
    },
    "psoriasis": {
        "count": {"few": 0.6, "many": 0.4},
        "size": {"large": 0.9, "small": 0.1},
        "colour": {"red": 0.8, "pink": 0.2},
        "border": {"sharp": 0.9, "irregular": 0.1},
        "surface": {"scaly": 1.0},
        "site": {"limb": 0.6, "trunk": 0.4},
    },
    "lichen planus": {
        "count": {"many": 0.7, "few": 0.3},
        "size": {"small": 0.9, "large": 0.1},
        "colour": {"violet": 0.9, "red": 0.1},
        "border": {"sharp": 0.9, "irregular": 0.1},
        "surface": {"shiny": 0.8, "scaly": 0.2},
        "site": {"limb": 0.6, "hand": 0.4},
    },
    "seborrheic keratosis": {
        "count": {"few": 0.5, "single": 0.3, "many": 0.2},
        "size": {"small": 0.4, "large": 0.6},
        "colour": {"brown": 0.8, "black": 0.2},
        "border": {"sharp": 0.9, "irregular": 0.1},
        "surface": {"warty": 0.9, "crusted": 0.1},
        "site": {"trunk": 0.6, "face": 0.4},
    },
}
NOISE = 0.12
SKIN = np.array([[236, 200, 178], [222, 178, 150], [200, 152, 120], [176, 126, 94]], float)
PIGMENT = {
    "red": (190, 40, 40),
    "pink": (238, 140, 150),
    "brown": (112, 66, 34),
    "black": (34, 26, 28),
}
PIGMENT["violet"] = (120, 56, 150)
RADIUS = {  # in units of the picture's side
    "single": {"small": (0.09, 0.11), "large": (0.21, 0.26)},
    "few": {"small": (0.06, 0.075), "large": (0.13, 0.15)},
    "many": {"small": (0.04, 0.05), "large": (0.085, 0.095)},
}
NUMBER = {"single": (1, 1), "few": (3, 3), "many": (8, 9)}


@dataclass(frozen=True)
class Picture:
    """What one picture shows; `disease` is None where the attributes were drawn independently."""

    facts: dict[str, str]
    disease: str | None = None


def draw_facts(rng: np.random.Generator, disease: str | None = None) -> dict[str, str]:
    """Attribute values of one picture: by the disease's distribution, or uniform without a disease."""
    facts = {}
    for name, values in ATTRIBUTES.items():
        uniform = disease is None or rng.random() < NOISE
        rule = dict.fromkeys(values, 1 / len(values)) if uniform else DISEASES[disease][name]
        facts[name] = str(
            rng.choice(list(rule), p=np.array(list(rule.values())) / sum(rule.values()))
        )
    return facts


def bayes_accuracy(n: int, seed: int = 0) -> float:
    """Accuracy of the best possible diagnosis from perfectly seen attributes: the ceiling of the task."""
    rng = np.random.default_rng(seed)
    names = list(DISEASES)
    right = 0
    for i in range(n):
        truth = names[i % len(names)]
        facts = draw_facts(rng, truth)
        right += max(names, key=lambda d: _log_likelihood(facts, d)) == truth
    return right / n


def _log_likelihood(facts: dict[str, str], disease: str) -> float:
    uniform = {name: 1 / len(values) for name, values in ATTRIBUTES.items()}
    rule = DISEASES[disease]
    return sum(
        np.log(NOISE * uniform[a] + (1 - NOISE) * rule[a].get(v, 0.0) / sum(rule[a].values()))
        for a, v in facts.items()
    )


def render(facts: dict[str, str], rng: np.random.Generator, size: int = 72) -> np.ndarray:
    """Draw the picture of these facts, [size, size, 3] uint8; twice the resolution, then averaged down."""
    side = 2 * size
    yy, xx = np.mgrid[0:side, 0:side] / side
    tone = SKIN[rng.integers(len(SKIN))]
    picture = np.broadcast_to(tone, (side, side, 3)) * (0.95 + 0.1 * rng.random())
    coarse = rng.normal(0, 4, (side // 8, side // 8))
    picture = (
        picture
        + np.kron(coarse, np.ones((8, 8)))[:side, :side, None]
        + rng.normal(0, 3, (side, side, 1))
    )
    picture = _draw_site(picture, facts["site"], xx, yy, rng)
    for cx, cy, radius in _places(facts, rng):
        low = [max(int((c - 1.8 * radius) * side), 0) for c in (cy, cx)]
        box = tuple(slice(a, a + int(3.6 * radius * side)) for a in low)
        dx, dy = xx[box] - cx, yy[box] - cy
        picture[box] = _draw_lesion(picture[box], facts, dx, dy, radius, tone, rng)
    small = picture.reshape(size, 2, size, 2, 3).mean((1, 3))
    return np.clip(small + rng.normal(0, 2, small.shape), 0, 255).astype(np.uint8)


def _draw_site(picture, site, xx, yy, rng):
    """Backgrounds: hair above a face, cloth beside a limb, gaps between fingers, nothing around the trunk."""
    cloth = np.array([[70, 90, 130], [90, 120, 100], [130, 130, 140]][rng.integers(3)], float)
    if site == "face":
        hair = yy < 0.11 + 0.02 * np.sin(12 * xx + rng.random() * 6)
        return np.where(
            hair[..., None], np.array([60, 42, 30]) + 18 * np.sin(90 * xx)[..., None], picture
        )
    if site == "limb":
        slope = rng.uniform(-0.1, 0.1)
        outside = np.abs(xx - 0.5 - slope * (yy - 0.5)) > 0.40
        return np.where(outside[..., None], cloth, picture)
    if site == "hand":
        gap = (np.abs(((xx * 4 + 0.5) % 1) - 0.5) < 0.06) & (yy > 0.74)
        return np.where(gap[..., None], np.array([48, 30, 26]), picture)
    return picture


def _places(facts, rng):
    """Centres and radii of lesions, kept apart by rejection where there is room."""
    low, high = NUMBER[facts["count"]]
    rlow, rhigh = RADIUS[facts["count"]][facts["size"]]
    places: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(low, high + 1))):
        radius = rng.uniform(rlow, rhigh)
        for _ in range(60):
            cx, cy = (
                rng.uniform(0.18 + radius * 0.4, 0.82 - radius * 0.4),
                rng.uniform(0.2, 0.74 - radius * 0.3),
            )
            if all(np.hypot(cx - x, cy - y) > 1.25 * (radius + r) for x, y, r in places):
                places.append((cx, cy, radius))
                break
    return places


def _draw_lesion(picture, facts, dx, dy, radius, tone, rng):
    """One lesion: pigment under an edge, then the surface's marks on it."""
    angle, distance = np.arctan2(dy, dx), np.hypot(dx, dy * rng.uniform(0.9, 1.1))
    edge = np.full_like(distance, radius)
    if facts["border"] == "irregular":
        phase = rng.uniform(0, 6.3, 2)
        edge = radius * (
            1 + 0.28 * np.sin(3 * angle + phase[0]) + 0.22 * np.sin(5 * angle + phase[1])
        )
    width = 0.45 * radius if facts["border"] == "blurred" else 0.008
    mask = np.clip(0.5 + (edge - distance) / (2 * width), 0, 1)[..., None]
    pigment = np.array(PIGMENT[facts["colour"]], float) * rng.uniform(0.92, 1.08)
    picture = picture * (1 - 0.88 * mask) + pigment * 0.88 * mask
    if facts["border"] == "rolled":
        ring = (np.abs(distance - edge) < max(0.16 * radius, 0.016))[..., None]
        picture = np.where(ring, np.minimum(tone * 1.12 + 14, 255), picture)
    return _draw_surface(picture, facts["surface"], dx, dy, distance / radius, radius, rng)


def _draw_surface(picture, surface, dx, dy, r, radius, rng):
    """Marks inside the lesion; `r` is the distance from its centre in radii."""
    if surface == "scaly":
        flakes = np.kron(
            rng.random((picture.shape[0] // 3, picture.shape[1] // 3)) < 0.32, np.ones((3, 3), bool)
        )
        flakes = np.pad(
            flakes, [(0, s - f) for s, f in zip(picture.shape, flakes.shape, strict=False)]
        )
        return np.where((flakes & (r < 0.95))[..., None], 244.0, picture)
    if surface == "shiny":
        spot = np.hypot(dx + 0.3 * radius, dy + 0.3 * radius) < 0.34 * radius
        return np.where(spot[..., None], 255.0, picture)
    if surface == "crusted":
        return np.where((r < 0.55)[..., None], np.array([206.0, 160, 40]), picture)
    if surface == "warty":
        step = max(radius * 0.42, 0.03)
        dots = (
            np.hypot((dx + step / 2) % step - step / 2, (dy + step / 2) % step - step / 2)
            < 0.3 * step
        ) & (r < 0.9)
        return np.where(dots[..., None], np.array([226.0, 196, 150]), picture)
    return picture


def pictures(
    n: int, *, seed: int, size: int = 72, diseases: bool = True
) -> tuple[list[Picture], np.ndarray]:
    """n pictures, classes in turn (or attributes independent of any disease); images [n, size, size, 3] uint8."""
    names = list(DISEASES)
    drawn, images = [], np.empty((n, size, size, 3), np.uint8)
    for i in track(range(n), "pictures"):
        rng = np.random.default_rng([seed, i])
        disease = names[i % len(names)] if diseases else None
        drawn.append(Picture(draw_facts(rng, disease), disease))
        images[i] = render(drawn[-1].facts, rng, size)
    return drawn, images


def make(*, n_train: int, n_test: int, n_heldout: int, size: int, seed: int) -> Dataset:
    """The synthetic data set: every split from its own seed, one picture a group, classes in turn."""
    items, images = [], []
    for i, (split, n) in enumerate([("train", n_train), ("test", n_test), ("heldout", n_heldout)]):
        drawn, pixels = pictures(n, seed=1000 * seed + i, size=size)
        for picture in drawn:
            name = f"{split}-{len(items):05d}"
            items.append(
                Item(name, split, picture.disease, name, len(items), picture.facts, "synthetic")
            )
        images.append(pixels)
    return Dataset(tuple(items), np.concatenate(images))
