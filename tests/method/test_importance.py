"""Values of units, their journal and frames, and the plans that they give."""

import dataclasses
import itertools
import json
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from derm_compress.errors import DermError
from derm_compress.evaluate import answers
from derm_compress.files import Journal
from derm_compress.method.importance import measure, scoring
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.plans import pruning_plans
from derm_compress.method.importance.rankings import Ranking
from derm_compress.method.pruning.plan import Plan
from derm_compress.model import anatomy, removal
from derm_compress.model.units import Unit

DATA_DRIVEN = ("output_similarity", "perplexity", "block_influence", "angular", "taylor")
PROTECTED = (0, 1, 7)


def units_of(*told):
    return [Unit.of(unit) for unit in told]


def plain(units):
    return tuple(unit.plain for unit in units)


def different(text):
    """Stands for the sentence transformer where only equal or not matters."""
    vector = np.zeros(1009)
    vector[zlib.crc32(text.encode()) % 1009] = 1.0
    return vector


class Letters:
    """Embeds a text as the unit vector of how often each letter occurs: likeness by degrees."""

    name = "by letters"

    def __call__(self, text):
        counts = np.bincount(np.frombuffer(f" {text}".encode(), np.uint8), minlength=256)
        return counts / np.linalg.norm(counts)


@pytest.fixture
def calibration(pico, dataset):
    return Calibration(*pico, dataset.of("train")[:2], dataset.images, different, 3, 6)


def ranked(names, c, *, protected=PROTECTED, most=5, journal=None):
    """(plans by name, measured rows)."""
    journal = journal or Journal()
    measured = measure.measure_importance(names, c, journal)
    how = {"protected": protected, "most": most, "journal": journal}
    told = pruning_plans(names, measured, c, **how)
    return {name: Plan.from_dict(plan) for name, plan in told.items()}, measured


def scripted(monkeypatch, table, name="block_influence"):
    """A criterion of values table(removed, block); the blocks that are left tell which went."""
    marks, calls = {}, []

    def rows(c, units):
        layers = list(anatomy.blocks(c.model))
        original = [marks.setdefault(id(layer), len(marks)) for layer in layers]
        gone = tuple(sorted({*range(8)} - {*original}))
        for unit in units:
            calls.append((gone, original[unit.block]))
            value = float(table(gone, original[unit.block]))
            for item in c.items:
                yield {"unit": unit, "item": item.id, "value": value}

    monkeypatch.setattr(scoring, name, rows)
    return calls


def perplexity_of(c):
    """Mean negative log-likelihood of the references, by the model as it is."""
    with torch.inference_mode():
        reading = c.reading()
        scores = reading.predictions(reading.last)
    pairs = zip(scores, map(torch.tensor, reading.told), strict=True)
    return np.mean([cross_entropy(row[:-1], told).item() for row, told in pairs])


def fit_head(c):
    """A head that tells the references as well as a linear map can: less of a model does worse."""
    read, targets = [], []
    with torch.inference_mode():
        reading = c.reading()
        for row, asked, told in zip(reading.last, reading.asked, reading.told, strict=True):
            read.append(anatomy.decoder(c.model).norm(row[asked - 1 : asked - 1 + len(told)]))
            targets += told
    x = torch.cat(read).double()
    wanted = one_hot(torch.tensor(targets), c.model.lm_head.out_features).double()
    found = torch.linalg.lstsq(x, wanted, driver="gelsd").solution
    c.model.lm_head.weight.data = (20 * found.T).float()


@pytest.mark.parametrize("end", ["", "-iterative"])
@pytest.mark.parametrize("criterion", DATA_DRIVEN)
def test_blocks_that_add_nothing_go_first(calibration, criterion, end):
    c = dataclasses.replace(calibration, items=calibration.items[:1])
    fit_head(c)
    with torch.no_grad():
        for index in (4, 6):
            anatomy.blocks(c.model)[index].self_attn.o_proj.weight.zero_()
            anatomy.blocks(c.model)[index].mlp.down_proj.weight.zero_()
    plans, _ = ranked([criterion + end], c, most=3)
    order, scores = plans[criterion + end].order[:3], plans[criterion + end].scores
    assert {*order[:2]} == {Unit(4), Unit(6)} and scores[2] > scores[0] + 1e-4
    alone = perplexity_of(c) if criterion == "perplexity" else 0.0
    cosine = criterion in ("block_influence", "angular")
    assert scores[:2] == pytest.approx([alone] * 2, abs=1e-6 if cosine else 1e-12)


def test_protected_blocks_count_from_both_ends(pico):
    assert measure.protected_blocks(pico[0], [0, 1, -1]) == PROTECTED
    with pytest.raises(DermError, match="blocks 0 to 7"):
        measure.protected_blocks(pico[0], [8])


# Orders


def test_iterative_scores_what_is_left_anew_and_the_first_step_once(calibration, monkeypatch):
    """Of the twins 3 and 4 either can go, but not both."""

    def table(gone, block):
        if {*gone, block} >= {3, 4}:
            return 9
        return 1 if block in (3, 4) else block

    calls = scripted(monkeypatch, table)
    names = ["block_influence", "block_influence-iterative"]
    both = dataclasses.replace(calibration, batch_size=6)  # both pictures at once
    plans, _ = ranked(names, both, most=4)
    once, anew = (plans[name] for name in names)
    assert plain(once.order) == (3, 4, 2, 5, 6) and once.scores == (1, 1, 2, 5, 6)
    assert plain(anew.order) == (3, 2, 5, 6) and anew.scores == (1, 2, 5, 6)
    steps = ((), (3,), (2, 3), (2, 3, 5), (2, 3, 5, 6))
    assert [sum(gone == step for gone, _ in calls) for step in steps] == [8, 4, 3, 2, 0]


def test_iterative_sublayers_keep_their_names_when_a_whole_block_is_gone(calibration):
    first, rest = units_of("3.mlp", "3.attention"), units_of("2.mlp", "4.attention", "6.mlp")
    assert plain(measure.positions(rest, first)) == ("2.mlp", "3.attention", "5.mlp")
    assert measure.positions(rest, first[:1]) == rest
    assert plain(measure.positions(units_of(0, 4, 6), units_of(5, 2))) == (0, 3, 4)
    ranking = Ranking.of("perplexity-sublayers")
    with removal.without(calibration.model, first):
        found = measure.unit_rows(ranking, calibration, rest, journal=Journal(), removed=first)
    for unit, values in found.groupby("unit").value:
        with removal.without(calibration.model, [*first, unit]):
            assert values.mean() == pytest.approx(perplexity_of(calibration), rel=1e-5)


def test_iterative_output_similarity_compares_with_the_whole_model(calibration):
    c = dataclasses.replace(calibration, items=calibration.items[:1], embed=Letters())
    fit_head(c)
    plans, _ = ranked(["output_similarity-iterative"], c, most=2)
    plan, said = plans["output_similarity-iterative"], []
    assert plan.settings["embedder"] == "by letters" and plan.settings["iterative_blocks"] == 2
    how = {"variant": "x", "batch_size": 3, "max_new_tokens": 6}
    for n in range(3):
        with removal.without(c.model, plan.removed(n)):
            told = answers.answer(c.model, c.processor, c.items, c.images, **how).answer
        said.append(np.stack([c.embed(text) for text in told]))
    lost = [1 - (said[0] * one).sum(1).mean() for one in said]
    assert plan.scores == pytest.approx(lost[1:])
    assert abs(lost[2] - (1 - (said[1] * said[2]).sum(1).mean())) > 1e-3


@pytest.mark.parametrize("protected", [PROTECTED, (4,), ()])
def test_windows_are_the_least_of_all_that_spare_protected_blocks(calibration, protected):
    names = ["angular-contiguous", "perplexity-contiguous", "random-0-contiguous-unprotected"]
    plans, measured = ranked(names, calibration, protected=protected)
    for name, plan in plans.items():
        spared = set() if "unprotected" in name else {*protected}
        told = measured[measured.ranking == Ranking.of(name).base]
        mean, score = told.groupby("block").value.mean(), {}
        for start, end in itertools.combinations(range(9), 2):
            window = range(start, end)
            if name.startswith("angular"):
                runs = told[told.block == start].runs
                score[window] = np.mean([run[len(window) - 1] for run in runs])
            else:
                score[window] = mean[list(window)].sum()
        score = {window: lost for window, lost in score.items() if not {*window} & spared}
        assert plan.most == max(map(len, score)) and plan.order == ()
        for n in range(1, plan.most + 1):
            best = min((window for window in score if len(window) == n), key=score.get)
            assert plain(plan.removed(n)) == tuple(best)
            assert plan.scores[n - 1] == pytest.approx(score[best])


def test_unprotected_spares_no_block_and_draws_differ(calibration):
    names = ["last", "last-unprotected", "random-0", "random-1", "last-sublayers"]
    plans, measured = ranked(names, calibration)
    assert plain(plans["last"].order) == (6, 5, 4, 3, 2)
    assert plans["last"].protected == PROTECTED
    assert plain(plans["last-unprotected"].order) == (7, 6, 5, 4, 3, 2, 1, 0)
    assert plans["last-unprotected"].protected == ()
    assert plain(plans["last-sublayers"].order[:3]) == ("6.mlp", "6.attention", "5.mlp")
    assert plans["random-0"].order != plans["random-1"].order
    assert (measured.ranking == "last").sum() == 8, "what is done after scoring is not scored again"


def test_plans_say_how_they_were_made_and_survive_json(calibration):
    names = ["block_influence-text", "random-2", "angular-contiguous", "last-sublayers"]
    plans, _ = ranked(names, calibration)
    for plan in plans.values():
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        plan.check(blocks=8, fingerprint=plan.fingerprint)
    settings = plans["block_influence-text"].settings
    assert settings["items"] == ["train-00000", "train-00001"] and settings["text_only"]
    assert settings["options"] == ["text"] and "Men et al." in settings["source"]
    assert "items" not in plans["random-2"].settings and plans["random-2"].settings["seed"] == 2


def test_the_published_plan_needs_no_measuring_and_another_model(calibration):
    measured = measure.measure_importance(["published"], calibration, Journal())
    assert measured.empty
    assert measure.importance_scores(measure.importance_values(measured), (0,)).empty
    with pytest.raises(DermError, match="published: made for a model of 32 blocks"):
        ranked(["last", "published"], calibration)


def test_without_pictures_all_questions_are_alike(calibration):
    """Output similarity then has one result a unit and question; perplexity reads answers."""
    names = ["output_similarity-text", "perplexity-text"]
    measured = measure.measure_importance(names, calibration, Journal())
    found = measured.groupby("ranking").item.unique()
    assert found["output_similarity-text"].tolist() == [""] and len(found["perplexity-text"]) == 2


def test_values_that_are_no_numbers_are_refused(calibration):
    with torch.no_grad():
        anatomy.blocks(calibration.model)[4].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DermError, match="ranking magnitude: unit 4 gives nan"):
        measure.measure_importance(["magnitude"], calibration, Journal())


# Journal


class Cut(Journal):
    """Is stopped after so many rows."""

    def __init__(self, path, rows):
        super().__init__(path)
        self.rows = rows

    def add(self, key, row):
        if len(self.done) == self.rows:
            raise KeyboardInterrupt
        super().add(key, row)


STOPPED = ["perplexity", "block_influence", "angular", "output_similarity", "taylor-mlp"]


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_ranking_ends_in_the_same_bytes_whatever_its_batches(
    calibration, dataset, tmp_path, name
):
    # batches of 3 and 2 items
    c = dataclasses.replace(calibration, items=dataset.of("train")[:5], batch_size=9)
    units = [unit for unit in Ranking.of(name).units(8) if unit.block in (2, 3)]
    asked, log = (Ranking.of(name), c, units), tmp_path / "log.jsonl"
    whole = measure.unit_rows(*asked, journal=Journal())
    with pytest.raises(KeyboardInterrupt):
        measure.unit_rows(*asked, journal=Cut(log, len(whole) // 2 - 1))
    again = measure.unit_rows(*asked, journal=Journal(log))
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


def counted(monkeypatch, name):
    """(unit, item) of every row that a criterion is asked for from now on."""
    computed, inner = [], getattr(scoring, name)

    def rows(c, units):
        computed.extend(itertools.product(units, [item.id for item in c.items]))
        yield from inner(c, units)

    monkeypatch.setattr(scoring, name, rows)
    return computed


def test_of_a_cut_batch_only_the_units_that_lack_a_result_are_computed(
    calibration, dataset, monkeypatch
):
    # two items a batch
    c = dataclasses.replace(calibration, items=dataset.of("train")[:4], batch_size=6)
    ranking, units = Ranking.of("perplexity"), units_of(2, 3, 4)
    full, kept = Journal(), Journal()
    whole = measure.unit_rows(ranking, c, units, journal=full)
    # unit 4, the first one done, of the first batch; and one answer without unit 3
    for key in list(full.done)[:7]:
        kept.add(key, full.done[key])
    computed = counted(monkeypatch, "perplexity")
    again = measure.unit_rows(ranking, c, units, journal=kept)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    one, two, three, four = (item.id for item in c.items)
    first = itertools.product(units_of(2, 3), [one, two])
    assert computed == [*first, *itertools.product(units, [three, four])]
    computed.clear()
    measure.unit_rows(ranking, c, units, journal=kept)
    assert computed == []


@pytest.mark.parametrize(("rows", "again"), [(30, ["train-00001"]), (50, [])])
def test_a_stopped_iterative_ranking_asks_the_whole_model_nothing_twice(
    calibration, monkeypatch, tmp_path, rows, again
):
    """Of 8 blocks there are 2 x 24 rows, a picture after the other; then those after a removal."""
    name, log, asked = "output_similarity-iterative", tmp_path / "log.jsonl", []
    whole, _ = ranked([name], calibration, most=2)
    with pytest.raises(KeyboardInterrupt):
        ranked([name], calibration, most=2, journal=Cut(log, rows))
    inner = Calibration.answers

    def answers(c, units):
        if len(anatomy.blocks(c.model)) == 8:
            asked.extend(item.id for item in c.items)
        return inner(c, units)

    monkeypatch.setattr(Calibration, "answers", answers)
    journal = Journal(log)
    assert len(journal.done) == rows
    assert ranked([name], calibration, most=2, journal=journal)[0] == whole and asked == again


# Frames


def told(values, ranking="x"):
    rows = []
    for block, value in enumerate(values):
        where = {"ranking": ranking, "unit": str(block), "block": block, "part": "block"}
        for item, question, more in (("a", "name", 0), ("a", "features", 1), ("b", "name", 2)):
            rows.append(where | {"item": item, "question": question, "value": value + more})
    return pd.DataFrame(rows)


def test_values_are_means_over_questions_and_scores_over_pictures():
    values = measure.importance_values(told([1.0, 2.0]))
    assert values.value.tolist() == [1.5, 3.0, 2.5, 4.0]
    assert values.item.tolist() == ["a", "b", "a", "b"]
    assert measure.importance_scores(values, []).score.tolist() == [2.25, 3.25]


def test_ranks_protect_and_break_ties_by_position():
    frame = pd.concat([told([5.0, 1.0, 2.0, 2.0, 0.5]), told([0.0, 3.0, 2.0, 1.0, 0.0], "y")])
    scores = measure.importance_scores(measure.importance_values(frame), [0, 4])
    ranks = {name: rows["rank"].tolist() for name, rows in scores.groupby("criterion")}
    assert ranks["x"][1:4] == [0, 1, 2] and ranks["y"][1:4] == [2, 1, 0]
    assert all(np.isnan(rank[b]) for rank in ranks.values() for b in (0, 4))


def test_measured_units_know_their_block_and_part_and_orders_agree(calibration):
    plans, measured = ranked(["perplexity", "magnitude-sublayers"], calibration)
    parts = measured[measured.ranking == "magnitude-sublayers"].head(3)
    assert parts.unit.tolist() == ["0.attention", "0.mlp", "1.attention"]
    assert parts.block.tolist() == [0, 0, 1]
    assert parts.part.tolist() == ["attention", "mlp", "attention"]
    scores = measure.importance_scores(measure.importance_values(measured), PROTECTED)
    for name, rows in scores.dropna().sort_values("rank").groupby("criterion"):
        parts = rows.part.replace("block", "")
        assert tuple(map(Unit, rows.block, parts)) == plans[name].order


def test_the_answers_behind_the_values_are_kept(calibration):
    _, measured = ranked(["output_similarity", "last"], calibration)
    said = measured[measured.ranking == "output_similarity"]
    assert len(said) == 8 * 2 * 3 and (said.accepted <= said.tokens).all()
    same = said.answer == said.original
    assert (said.value[same] == 0).all() and 0 < same.sum() < len(same)
    assert said.groupby(["item", "question"]).original.nunique().eq(1).all()


def test_further_draws_share_no_picture_and_end_where_the_pictures_do(calibration, dataset):
    items, seen = dataset.of("train")[:7], []

    class Seen(Journal):
        def add(self, key, row):
            seen.append(row["item"])
            super().add(key, row)

    how = {"importance_draws": 9, "seed": 0}
    found = measure.importance_draws(["block_influence"], calibration, items, **how, journal=Seen())
    assert found.groupby("draw").size().to_dict() == {1: 8, 2: 8}  # two of two, one is left over
    assert len(set(seen)) == 4 and not set(seen) & {item.id for item in calibration.items}
    alone = found[found.draw == 1].set_index("block").score
    part = [item for item in items if item.id in seen[:16]]
    measured = measure.measure_importance(
        ["block_influence"], dataclasses.replace(calibration, items=part), Journal()
    )
    assert np.allclose(alone, measured.groupby("block").value.mean())
    once = {"importance_draws": 1, "seed": 0, "journal": Journal()}
    assert measure.importance_draws(["block_influence"], calibration, items, **once).empty
