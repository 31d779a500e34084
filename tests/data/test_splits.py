"""Groups by likeness, and splits that are even, sized and never separate a group."""

from collections import Counter

import numpy as np
import pytest

from derm_compress.data import splits


def patients(seed, n=400, classes=8):
    """Groups of one to three images of a class; every tenth has one of another class too."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(n):
        one, other = rng.integers(classes, size=2)
        found[f"g{i}"] = Counter([f"c{one}"] * rng.integers(1, 4) + [f"c{other}"] * (i % 10 == 0))
    return found


def per_split(found, home):
    counts = {name: Counter() for name in ("train", "dev", "test", "heldout")}
    for group, name in home.items():
        counts[name] += found[group]
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_sizes_and_balance(seed):
    found = patients(seed)
    sizes = {"test": 39, "heldout": 120, "dev": 40, "train": 300}
    home = splits.split(found, sizes=sizes, seed=seed)
    got = per_split(found, home)
    assert {name: counts.total() for name, counts in got.items()} == sizes | {"train": 300 - 40}
    for counts in got.values():
        assert max(counts.values()) - min(counts.values()) <= 6  # groups hold up to 4 images
    assert home == splits.split(dict(reversed(found.items())), sizes=sizes, seed=seed)


def test_small_classes_keep_their_share_for_training():
    names = [*["a"] * 30, *["b"] * 3, "c"]
    found = {f"{name}{i}": Counter([name]) for i, name in enumerate(names)}
    got = per_split(found, splits.split(found, sizes={"test": 20, "heldout": 20}, seed=0))
    assert got["test"] == {"a": 15, "b": 1} and not got["heldout"]
    assert got["train"] == {"a": 15, "b": 2, "c": 1}
    half = {f"g{i}": Counter([f"c{i}"]) for i in range(4)}
    assert set(splits.split(half, sizes={"test": 2}, seed=0, train_only=half).values()) == {"train"}


def test_near_links_by_distance_and_in_chains():
    rng = np.random.default_rng(0)
    flips = [sum(1 << int(b) for b in rng.choice(64, k % 7, replace=False)) for k in range(800)]
    hashes = rng.integers(0, 2**64, 250, dtype=np.uint64)[rng.integers(0, 250, 800)]
    hashes = hashes ^ np.array(flips, np.uint64)
    linked = np.bitwise_count(hashes[:, None] ^ hashes) <= 4
    while not np.array_equal(linked, grown := linked @ linked):  # until all chains are closed
        linked = grown
    labels = splits.near(hashes, 4)
    assert np.array_equal(labels[:, None] == labels, linked)


def test_vectors_are_linked_by_cosine_and_keys_in_chains():
    vectors = np.array([[1, 0], [0, 1], [0.995, 0.0999]], np.float32)
    assert splits.near_vectors(vectors, 0.01).tolist() == [0, 1, 0]
    assert splits.join([("a",), ("a", "b"), ("c",), ("b",), ()]).tolist() == [0, 0, 1, 0, 2]
