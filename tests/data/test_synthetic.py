import numpy as np

from derm_compress.data import synthetic


def test_rules_are_distributions_over_known_values():
    for rules in synthetic.DISEASES.values():
        assert rules.keys() == synthetic.ATTRIBUTES.keys()
        for name, rule in rules.items():
            assert set(rule) <= set(synthetic.ATTRIBUTES[name])
            assert np.isclose(sum(rule.values()), 1)


def test_same_seed_same_bytes_other_seed_other_pictures():
    a, b, c = (synthetic.pictures(6, seed=s)[1] for s in (5, 5, 6))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_the_task_has_a_ceiling_below_certainty():
    assert 0.8 < synthetic.bayes_accuracy(1600) < 0.97


def test_attributes_show_in_the_pixels():
    facts = {
        "count": "single",
        "size": "large",
        "colour": "black",
        "border": "sharp",
        "surface": "smooth",
    }
    dark = [
        (
            synthetic.render(facts | change | {"site": "trunk"}, np.random.default_rng(2)).mean(-1)
            < 70
        ).mean()
        for change in ({}, {"size": "small"}, {"colour": "pink"})
    ]
    assert dark[0] > 3 * dark[1] > 0 and dark[2] == 0


def test_make_keeps_splits_apart_and_counts():
    dataset = synthetic.make(n_train=17, n_test=9, n_heldout=4, size=40, seed=1)
    assert [len(dataset.of(s)) for s in ("train", "test", "heldout")] == [17, 9, 4]
    assert dataset.images.shape == (30, 40, 40, 3) and len({i.id for i in dataset.items}) == 30
    train, test = (dataset.images[[i.row for i in dataset.of(s)]] for s in ("train", "test"))
    assert not any((train == picture).all((1, 2, 3)).any() for picture in test)
