"""Procedural skin pictures with known attributes: without patients, copyright or downloads.

Six attributes are drawn so that a small vision tower can see them; each of the eight diseases has
its own, overlapping distribution over them (synthetic.yaml), so that no picture is certain. A
teaching device, not a model of dermatology.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from importlib.resources import files

import numpy as np
import yaml

from derm_compress.data import splits
from derm_compress.data.items import Dataset, Item
from derm_compress.progress import track

TABLE = yaml.safe_load((files("derm_compress.data") / "synthetic.yaml").read_text("utf-8"))
ATTRIBUTES: dict[str, list[str]] = TABLE["attributes"]
DISEASES: dict[str, dict[str, dict[str, float]]] = TABLE["diseases"]  # P(value | disease)
NOISE = 0.12  # share of pictures in which an attribute is uniform instead
SKIN = np.array([[236, 200, 178], [222, 178, 150], [200, 152, 120], [176, 126, 94]], float)
CLOTH = [[70, 90, 130], [90, 120, 100], [130, 130, 140]]
PIGMENT = {
    "red": (190, 40, 40),
    "pink": (238, 140, 150),
    "brown": (112, 66, 34),
    "black": (34, 26, 28),
    "violet": (120, 56, 150),
}
NUMBER = {"single": (1, 1), "few": (3, 3), "many": (8, 9)}
RADIUS = {  # in units of the picture's side
    "single": {"small": (0.09, 0.11), "large": (0.21, 0.26)},
    "few": {"small": (0.06, 0.075), "large": (0.13, 0.15)},
    "many": {"small": (0.04, 0.05), "large": (0.085, 0.095)},
}


@dataclass(frozen=True)
class Picture:
    """What one picture shows; `disease` is None where the attributes were drawn independently."""

    facts: dict[str, str]
    disease: str | None = None


def make(
    *, n_train: int, n_test: int, n_heldout: int, size: int, seed: int, n_dev: int = 0
) -> Dataset:
    """The synthetic data set: one picture a group, splits of their own seeds, dev out of train."""
    items, images = [], []
    for i, (split, n) in enumerate([("train", n_train), ("test", n_test), ("heldout", n_heldout)]):
        drawn, pixels = pictures(n, seed=1000 * seed + i, size=size)
        for picture in drawn:
            row = len(items)
            name = f"{split}-{row:05d}"
            items.append(Item(name, split, picture.disease, name, row, picture.facts, "synthetic"))
        images.append(pixels)
    train = {item.group: Counter([item.disease]) for item in items[:n_train]}
    home = splits.split(train, sizes={"dev": n_dev}, seed=seed)
    items = [replace(item, split=home.get(item.group, item.split)) for item in items]
    return Dataset(tuple(items), np.concatenate(images))


def pictures(
    n: int, *, seed: int, size: int = 72, diseases: bool = True
) -> tuple[list[Picture], np.ndarray]:
    """n pictures, diseases in turn (or attributes independent of any); uint8 [n, size, size, 3]."""
    names = list(DISEASES)
    drawn, images = [], np.empty((n, size, size, 3), np.uint8)
    for i in track(range(n), "pictures"):
        rng = np.random.default_rng([seed, i])
        disease = names[i % len(names)] if diseases else None
        drawn.append(Picture(draw_facts(rng, disease), disease))
        images[i] = render(drawn[-1].facts, rng, size)
    return drawn, images


def draw_facts(rng: np.random.Generator, disease: str | None = None) -> dict[str, str]:
    """Attribute values of one picture: by its disease's distribution, or uniform without one."""
    facts = {}
    for name, values in ATTRIBUTES.items():
        if disease is None or rng.random() < NOISE:
            rule = dict.fromkeys(values, 1 / len(values))
        else:
            rule = DISEASES[disease][name]
        shares = np.array(list(rule.values()))
        facts[name] = str(rng.choice(list(rule), p=shares / sum(rule.values())))
    return facts


def render(facts: dict[str, str], rng: np.random.Generator, size: int = 72) -> np.ndarray:
    """Draw the picture of these facts, [size, size, 3] uint8, averaged down from twice the size."""
    side = 2 * size
    yy, xx = np.mgrid[0:side, 0:side] / side
    tone = SKIN[rng.integers(len(SKIN))]
    picture = np.broadcast_to(tone, (side, side, 3)) * (0.95 + 0.1 * rng.random())
    coarse = rng.normal(0, 4, (side // 8, side // 8))
    blotches = np.kron(coarse, np.ones((8, 8)))[:side, :side, None]
    picture = picture + blotches + rng.normal(0, 3, (side, side, 1))
    picture = _draw_site(picture, facts["site"], xx, yy, rng)
    for cx, cy, radius in _places(facts, rng):
        top, left = (max(int((c - 1.8 * radius) * side), 0) for c in (cy, cx))
        width = int(3.6 * radius * side)
        box = slice(top, top + width), slice(left, left + width)
        dx, dy = xx[box] - cx, yy[box] - cy
        picture[box] = _draw_lesion(picture[box], facts, dx, dy, radius, tone, rng)
    small = picture.reshape(size, 2, size, 2, 3).mean((1, 3))
    return np.clip(small + rng.normal(0, 2, small.shape), 0, 255).astype(np.uint8)


def _paint(picture, where, colour):
    """The picture with a colour, [3] or as large as it, where the mask [H, W] is set."""
    return np.where(where[..., None], colour, picture)


def _draw_site(picture, site, xx, yy, rng):
    """Hair above a face, cloth beside a limb, gaps between fingers, nothing around the trunk."""
    cloth = np.array(CLOTH[rng.integers(3)], float)
    if site == "face":
        below = 0.11 + 0.02 * np.sin(12 * xx + rng.random() * 6)
        strands = np.array([60, 42, 30]) + 18 * np.sin(90 * xx)[..., None]
        return _paint(picture, yy < below, strands)
    if site == "limb":
        slope = rng.uniform(-0.1, 0.1)
        return _paint(picture, np.abs(xx - 0.5 - slope * (yy - 0.5)) > 0.40, cloth)
    if site == "hand":
        gap = (np.abs(((xx * 4 + 0.5) % 1) - 0.5) < 0.06) & (yy > 0.74)
        return _paint(picture, gap, np.array([48, 30, 26]))
    return picture


def _places(facts, rng):
    """Centres and radii of lesions, kept apart by rejection where there is room."""
    low, high = NUMBER[facts["count"]]
    smallest, largest = RADIUS[facts["count"]][facts["size"]]
    places: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(low, high + 1))):
        radius = rng.uniform(smallest, largest)
        for _ in range(60):
            cx = rng.uniform(0.18 + radius * 0.4, 0.82 - radius * 0.4)
            cy = rng.uniform(0.2, 0.74 - radius * 0.3)
            if all(np.hypot(cx - x, cy - y) > 1.25 * (radius + r) for x, y, r in places):
                places.append((cx, cy, radius))
                break
    return places


def _draw_lesion(picture, facts, dx, dy, radius, tone, rng):
    """One lesion: pigment under an edge, then the surface's marks on it."""
    angle, distance = np.arctan2(dy, dx), np.hypot(dx, dy * rng.uniform(0.9, 1.1))
    edge = np.full_like(distance, radius)
    if facts["border"] == "irregular":
        a, b = rng.uniform(0, 6.3, 2)
        edge = radius * (1 + 0.28 * np.sin(3 * angle + a) + 0.22 * np.sin(5 * angle + b))
    width = 0.45 * radius if facts["border"] == "blurred" else 0.008
    mask = np.clip(0.5 + (edge - distance) / (2 * width), 0, 1)[..., None]
    pigment = np.array(PIGMENT[facts["colour"]], float) * rng.uniform(0.92, 1.08)
    picture = picture * (1 - 0.88 * mask) + pigment * 0.88 * mask
    if facts["border"] == "rolled":
        ring = np.abs(distance - edge) < max(0.16 * radius, 0.016)
        picture = _paint(picture, ring, np.minimum(tone * 1.12 + 14, 255))
    return _draw_surface(picture, facts["surface"], dx, dy, distance / radius, radius, rng)


def _draw_surface(picture, surface, dx, dy, r, radius, rng):
    """Marks inside the lesion; `r` is the distance from its centre in radii."""
    if surface == "scaly":
        rows, columns = picture.shape[:2]
        flakes = rng.random((rows // 3, columns // 3)) < 0.32
        flakes = np.kron(flakes, np.ones((3, 3), bool))
        flakes = np.pad(flakes, [(0, rows - len(flakes)), (0, columns - flakes.shape[1])])
        return _paint(picture, flakes & (r < 0.95), 244.0)
    if surface == "shiny":
        spot = np.hypot(dx + 0.3 * radius, dy + 0.3 * radius) < 0.34 * radius
        return _paint(picture, spot, 255.0)
    if surface == "crusted":
        return _paint(picture, r < 0.55, np.array([206.0, 160, 40]))
    if surface == "warty":
        step = max(radius * 0.42, 0.03)
        x, y = ((d + step / 2) % step - step / 2 for d in (dx, dy))
        dots = (np.hypot(x, y) < 0.3 * step) & (r < 0.9)
        return _paint(picture, dots, np.array([226.0, 196, 150]))
    return picture
