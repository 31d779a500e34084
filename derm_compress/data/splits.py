"""Which pictures belong together, and splits that never separate them. No torch."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def near(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Label [N] of perceptual hashes (uint64 [N]), linked where at most `distance` bits differ."""
    unique, code = np.unique(hashes, return_inverse=True)
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(unique), 512):
        differing = np.bitwise_count(unique[start : start + 512, None] ^ unique[None, start:])
        pairs.append(np.argwhere(differing <= distance) + start)
    return _components(len(unique), np.concatenate(pairs))[code]


def near_vectors(vectors: np.ndarray, distance: float) -> np.ndarray:
    """Label [N] of unit vectors [N, D], linked where their cosine is at least 1 - `distance`."""
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(vectors), 512):
        alike = vectors[start : start + 512] @ vectors[start:].T >= 1 - distance
        pairs.append(np.argwhere(alike) + start)
    return _components(len(vectors), np.concatenate(pairs))


def join(keys: Sequence[Iterable[str]]) -> np.ndarray:
    """Label [N] of rows, linked where they share one of their keys."""
    first: dict[str, int] = {}
    pairs = [(first.setdefault(key, i), i) for i, own in enumerate(keys) for key in own]
    return _components(len(keys), np.array(pairs, int).reshape(-1, 2))


def _components(n: int, pairs: np.ndarray) -> np.ndarray:
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def split(
    groups: Mapping[str, Counter],
    *,
    sizes: Mapping[str, int],
    seed: int,
    min_train_share: float = 0.5,
    train_only: Collection[str] = (),
) -> dict[str, str]:
    """The split of each group (a Counter of its images' classes), classes as even as they allow.

    `min_train_share` of each class stays for training, so a small source gives less than asked; dev is taken
    out of train by the same rule. A train size of 0 takes all the rest; groups beyond all sizes are left out.
    """
    names = sorted(groups)
    left = {names[i]: groups[names[i]] for i in np.random.default_rng(seed).permutation(len(names))}
    room = _share(left, 1 - min_train_share)
    home: dict[str, str] = {}
    for name in ("test", "heldout"):
        chosen = _take({g: left[g] for g in left if g not in train_only}, sizes.get(name, 0), room)
        home |= dict.fromkeys(chosen, name)
        left = {g: left[g] for g in left if g not in home}
    total = _share(left, 1)
    train = {g: left[g] for g in _take(left, sizes.get("train", 0) or total.total(), total)}
    free = {g: train[g] for g in train if g not in train_only}
    dev = _take(free, sizes.get("dev", 0), _share(train, 1 - min_train_share))
    return home | dict.fromkeys(train, "train") | dict.fromkeys(dev, "dev")


def _share(groups: Mapping[str, Counter], share: float) -> Counter:
    """How many images of each class are `share` of all, rounded down."""
    total = sum(groups.values(), Counter())
    return Counter({name: int(n * share) for name, n in total.items()})


def _take(groups: Mapping[str, Counter], n: int, room: Counter) -> list[str]:
    """Groups of n images or fewer, each from the class with fewest so far; what is taken leaves `room`."""
    queues = defaultdict(deque)
    for group, counts in groups.items():
        for name in counts:
            queues[name].append(group)
    taken, chosen = Counter(), {}
    while queues:
        name = min(queues, key=taken.__getitem__)
        if not queues[name]:
            del queues[name]
            continue
        group = queues[name].popleft()  # what does not fit now never will: n and room only shrink
        new = groups[group]
        fits = taken.total() + new.total() <= n and all(room[c] >= k for c, k in new.items())
        if fits and group not in chosen:
            chosen[group] = None
            taken.update(new)
            room.subtract(new)
    return list(chosen)
