"""Which pictures belong together, and splits that never separate them. No torch."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

TRAIN_SHARE = 0.5  # of each class, at least


def near(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Label [N] of perceptual hashes (uint64 [N]), linked where at most `distance` bits differ."""
    unique, code = np.unique(hashes, return_inverse=True)

    def alike(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.bitwise_count(some[:, None] ^ others[None]) <= distance

    return _linked(unique, alike)[code]


def near_vectors(vectors: np.ndarray, distance: float) -> np.ndarray:
    """Label [N] of unit vectors [N, D], linked where their cosine is at least 1 - `distance`."""
    return _linked(vectors, lambda some, others: some @ others.T >= 1 - distance)


def _linked(values: np.ndarray, alike: Callable) -> np.ndarray:
    """Label [N] of values, linked where alike(some, others) -> [n, m] says so; 512 at once."""
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(values), 512):
        pairs.append(np.argwhere(alike(values[start : start + 512], values[start:])) + start)
    return _components(len(values), np.concatenate(pairs))


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
    train_only: Collection[str] = (),
) -> dict[str, str]:
    """The split of each group (a Counter of its images' classes), classes as even as they allow.

    Half of each class stays for training, so a small source gives less than asked; dev is taken
    out of train by the same rule. A train size of 0 takes all the rest; groups beyond all sizes are
    left out, and those of `train_only` are never tested on.
    """
    names = sorted(groups)
    left = {names[i]: groups[names[i]] for i in np.random.default_rng(seed).permutation(len(names))}
    room = _share(left, 1 - TRAIN_SHARE)
    home: dict[str, str] = {}
    for name in ("test", "heldout"):
        chosen = _take({g: left[g] for g in left if g not in train_only}, sizes.get(name, 0), room)
        home |= dict.fromkeys(chosen, name)
        left = {g: left[g] for g in left if g not in home}
    total = _share(left, 1)
    train = {g: left[g] for g in _take(left, sizes.get("train", 0) or total.total(), total)}
    free = {g: train[g] for g in train if g not in train_only}
    dev = _take(free, sizes.get("dev", 0), _share(train, 1 - TRAIN_SHARE))
    return home | dict.fromkeys(train, "train") | dict.fromkeys(dev, "dev")


def why_untested(
    disease: str, groups: Mapping[str, Counter], n_test: int, train_only: Collection[str]
) -> str:
    """Why no group of a disease was taken for the test set."""
    sizes = {name: counts for name, counts in groups.items() if counts[disease]}
    total = sum(counts[disease] for counts in sizes.values())
    room = int(total * (1 - TRAIN_SHARE))
    free = [counts for name, counts in sizes.items() if name not in train_only]
    if not free:
        return f"its {total} pictures are alike to pictures of another label, and stay in training"
    if not room:
        return "it has one picture, and half of each class stays in training"
    if len(sizes) == 1:
        return (
            f"its {total} pictures are one group (patient, lesion or alike), and stay in training"
        )
    smallest = min(free, key=Counter.total)
    if smallest[disease] > room:
        of_all = f"{smallest[disease]} of its {total} pictures"
        return f"its smallest group has {of_all}, and half of each class stays in training"
    if smallest.total() > n_test:
        return f"its smallest group has {smallest.total()} pictures, more than n_test = {n_test}"
    return f"others took the places of n_test = {n_test}"


def _share(groups: Mapping[str, Counter], share: float) -> Counter:
    """How many images of each class are `share` of all, rounded down."""
    total = sum(groups.values(), Counter())
    return Counter({name: int(n * share) for name, n in total.items()})


def _take(groups: Mapping[str, Counter], n: int, room: Counter) -> list[str]:
    """Groups of n images or fewer, each from the class with fewest so far; they leave `room`."""
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
