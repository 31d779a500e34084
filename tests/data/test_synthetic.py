import hashlib

import numpy as np

from derm_compress.data import synthetic


def test_rules_are_distributions_over_known_values():
    for rules in synthetic.DISEASES.values():
        assert rules.keys() == synthetic.ATTRIBUTES.keys()
        for name, rule in rules.items():
            assert set(rule) <= set(synthetic.ATTRIBUTES[name])
            assert np.isclose(sum(rule.values()), 1)


def test_pictures_are_those_of_their_seed_and_never_change():
    first, second = (synthetic.pictures(8, seed=seed)[1] for seed in (5, 6))
    assert not np.array_equal(first, second)
    digest = hashlib.sha256(first.tobytes()).hexdigest()
    assert digest.startswith("5df32afeb71d")  # the tiny model and its report rest on them


def test_attributes_show_in_the_pixels():
    facts = {"count": "single", "border": "sharp", "surface": "smooth", "site": "trunk"}
    dark = []
    for size, colour in (("large", "black"), ("small", "black"), ("large", "pink")):
        shown = facts | {"size": size, "colour": colour}
        picture = synthetic.render(shown, np.random.default_rng(2))
        dark.append((picture.mean(-1) < 70).mean())
    assert dark[0] > 3 * dark[1] > 0 and dark[2] == 0


def test_make_keeps_splits_apart_and_counts():
    dataset = synthetic.make(n_train=17, n_test=9, n_heldout=4, size=40, seed=1)
    assert [len(dataset.of(s)) for s in ("train", "test", "heldout")] == [17, 9, 4]
    assert dataset.images.shape == (30, 40, 40, 3) and len({i.id for i in dataset.items}) == 30
    train, test = (dataset.images[[i.row for i in dataset.of(s)]] for s in ("train", "test"))
    assert not any((train == picture).all((1, 2, 3)).any() for picture in test)
