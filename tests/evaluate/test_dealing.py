"""Pictures dealt out between devices: processes side by side say what one says."""

import pandas as pd
import pytest

from derm_compress.evaluate import dealing
from derm_compress.evaluate.quantized import measure_quantized
from derm_compress.files import Journal
from derm_compress.model import devices
from derm_compress.model import variants as variants_of

HOW = {"device": "cpu", "batch_size": 2, "quantization_batch": 3, "max_new_tokens": 3}


@pytest.fixture
def rounded(recipe):
    rows = []
    for source, kept in (("original", range(8)), ("pruned", [0, 1, 4, 7])):
        made = recipe.pruned(kept).then("quantize", method="rtn", bits=3, group_size=64)
        rows.append(variants_of.variant(f"{source}|rtn3", made, source=source, quantizer="rtn"))
    return pd.DataFrame(rows)


def test_two_processes_answer_as_one_and_go_on_where_they_were_killed(
    rounded, store, dataset, tmp_path, monkeypatch
):
    seen, start = [], dealing.side_by_side

    def watched(work, shares):
        seen.extend(shares)
        start(work, shares)

    monkeypatch.setattr(dealing, "side_by_side", watched)
    asked = rounded, dataset.of("test")[:3], dataset.of("train")[:1], dataset.images
    alone, both = (Journal(tmp_path / name / "journal") for name in ("one", "two"))
    for journal in (alone, both):
        journal.path.parent.mkdir()
    measure_quantized(alone.path.parent, *asked, store=store, journal=alone, **HOW)
    assert not seen
    lines = alone.path.read_bytes().splitlines(keepends=True)
    begun = lines[:8]  # a variant's errors, a round of its answers, the beginning of another
    both.path.write_bytes(b"".join(begun))
    both = Journal(both.path)
    monkeypatch.setattr(dealing, "cards", lambda _: ["cpu", "cpu"])
    measure_quantized(both.path.parent, *asked, store=store, journal=both, **HOW)
    assert [len(share.items) for share in seen] == [2, 1]
    for name in ("answers.parquet", "errors.parquet"):
        one, two = (pd.read_parquet(tmp_path / folder / name) for folder in ("one", "two"))
        assert one.equals(two) and set(one.variant) == set(rounded.variant)
    kept = both.path.read_bytes().splitlines(keepends=True)
    assert kept[:8] == begun and sorted(kept) == sorted(lines) and both.done == alone.done


@pytest.fixture
def dealt(recipe, dataset, monkeypatch):
    """A function of (how many test pictures, too_small): the shares that they make for GPUs."""
    known = pd.DataFrame([variants_of.variant("v", recipe)])
    how = {"device": "cpu", "batch_size": 2, "max_new_tokens": 3, "journal": Journal()}
    monkeypatch.setattr(dealing, "cards", lambda _: [f"cuda:{gpu}" for gpu in range(4)])

    def shares(count, too_small=False):
        found = []
        monkeypatch.setattr(devices, "too_small", lambda *_, **__: too_small)
        monkeypatch.setattr(dealing, "side_by_side", lambda _, shares: found.extend(shares))

        def here(share, journal):
            found.append(share)

        dealing.deal(here, known, dataset.of("test")[:count], dataset.images, **how)
        return found

    return shares


def test_rounds_stay_whole_and_have_their_pictures(dealt, dataset):
    shares, items = dealt(5), dataset.of("test")
    assert [share.place["device"] for share in shares] == ["cuda:0", "cuda:1", "cuda:2"]
    for share, own in zip(shares, (items[:2], items[2:4], items[4:5]), strict=True):
        assert [item.id for item in share.items] == [item.id for item in own]
        for item, before in zip(share.items, own, strict=True):
            assert (share.images[item.row] == dataset.images[before.row]).all()


@pytest.mark.parametrize(("count", "too_small"), [(2, False), (0, False), (5, True)])
def test_one_round_or_a_model_over_all_gpus_is_asked_here(dealt, count, too_small):
    (share,) = dealt(count, too_small)
    assert share.place == {"device": "cpu", "wide": too_small}
    assert len(share.items) == count
