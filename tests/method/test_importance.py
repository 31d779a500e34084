"""Rankings: their names, plans, order of removal, journal and frames."""

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
from derm_compress.method.importance import criteria, measure
from derm_compress.method.importance.rankings import Ranking, rankings
from derm_compress.method.pruning.plan import Plan, published_plan
from derm_compress.model import anatomy, removal

DATA_DRIVEN = ("output_similarity", "perplexity", "block_influence", "angular", "taylor")


def different(text):
    """Stands for the sentence transformer where only equal or not matters."""
    vector = np.zeros(1009)
    vector[zlib.crc32(text.encode()) % 1009] = 1.0
    return vector


@pytest.fixture
def calibration(pico, dataset):
    return criteria.Calibration(*pico, dataset.of("train")[:2], dataset.images, different, 3, 6)


def ranked(names, c, *, journal=None, protected=(0, 1, 7), most=5):
    """(plans by name, measured rows)."""
    journal = journal or Journal()
    measured = measure.measure(names, c, journal)
    told = measure.plans(
        names, measured, c, protected=protected, most=most, fingerprint="f", journal=journal
    )
    return {name: Plan.from_dict(plan) for name, plan in told.items()}, measured


def scripted(monkeypatch, table, name="block_influence"):
    """A criterion whose values are table(removed, unit); the blocks that the model still has tell what was removed."""
    marks, calls = {}, []

    def rows(c, units):
        layers = list(anatomy.blocks(c.model))
        original = [marks.setdefault(id(layer), len(marks)) for layer in layers]
        for unit in units:
            place = original[removal.span(unit)[0] // 2]
            name = place if isinstance(unit, int) else f"{place}.{unit.partition('.')[2]}"
            gone = tuple(sorted({*range(8)} - {*original}))
            calls.append((gone, name))
            for item in c.items:
                yield {"unit": unit, "item": item.id, "value": float(table(gone, name))}

    monkeypatch.setitem(
        criteria.CRITERIA, name, dataclasses.replace(criteria.CRITERIA[name], rows=rows)
    )
    return calls


def perplexity_of(c):
    """Mean negative log-likelihood of the references, by the model as it is."""
    with torch.inference_mode():
        return np.mean(
            [
                cross_entropy(scores[:-1], torch.tensor(told)).item()
                for _, reading in c.readings()
                for scores, told in zip(
                    reading.predictions(reading.last), reading.told, strict=True
                )
            ]
        )


def fit_head(c):
    """A head that tells the references as well as a linear map can: taking part of the model away makes it worse."""
    read, targets = [], []
    with torch.inference_mode():
        for _, reading in c.readings():
            width = [
                torch.arange(len(t) + 1) + a - 1
                for a, t in zip(reading.asked, reading.told, strict=True)
            ]
            read += [
                anatomy.decoder(c.model).norm(reading.last[r, at[:-1]])
                for r, at in enumerate(width)
            ]
            targets += [token for told in reading.told for token in told]
    x = torch.cat(read).double()
    wanted = one_hot(torch.tensor(targets), c.model.lm_head.out_features).double()
    c.model.lm_head.weight.data = (
        20 * torch.linalg.lstsq(x, wanted, driver="gelsd").solution.T
    ).float()


@pytest.mark.parametrize(
    "name", [f"{name}{end}" for name in DATA_DRIVEN for end in ("", "-iterative")]
)
def test_blocks_that_add_nothing_go_first(calibration, name):
    c = dataclasses.replace(calibration, items=calibration.items[:1])
    fit_head(c)
    with torch.no_grad():
        for index in (4, 6):
            anatomy.blocks(c.model)[index].self_attn.o_proj.weight.zero_()
            anatomy.blocks(c.model)[index].mlp.down_proj.weight.zero_()
    plans, measured = ranked([name], c, most=3)
    order, scores = plans[name].order[:3], plans[name].scores
    assert set(order[:2]) == {4, 6} and scores[2] > scores[0] + 1e-4
    alone = perplexity_of(c) if "perplexity" in name else 0.0
    exact = "influence" not in name and "angular" not in name
    assert scores[:2] == pytest.approx([alone] * 2, abs=1e-12 if exact else 1e-6)


# Names


@pytest.mark.parametrize(
    ("name", "criterion", "options", "draw", "base"),
    [
        ("taylor", "taylor", set(), 0, "taylor"),
        ("random-3", "random", set(), 3, "random-3"),
        ("random-unprotected-12", "random", {"unprotected"}, 12, "random-12"),
        ("angular-contiguous", "angular", {"contiguous"}, 0, "angular"),
        ("perplexity-text-iterative", "perplexity", {"text", "iterative"}, 0, "perplexity-text"),
        ("output_similarity-mlp", "output_similarity", {"mlp"}, 0, "output_similarity-mlp"),
    ],
)
def test_names_say_criterion_and_options(name, criterion, options, draw, base):
    ranking = Ranking.of(name)
    assert (ranking.criterion, ranking.options, ranking.draw) == (criterion, options, draw)
    assert ranking.base() == base


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("perplexty", "did you mean perplexity"),
        (
            "zzz",
            "a criterion .output_similarity, perplexity, .* and options .iterative, contiguous, ",
        ),
        ("perplexity-text-often", "and options"),
        ("taylor-2", "only random has draws"),
        ("random-1-2", "the number of its draw"),
        ("random-²", "and options"),
        ("angular-contiguous-iterative", "ranked once; leave contiguous out"),
        ("angular-mlp-contiguous", "runs are of blocks"),
        ("magnitude-iterative", "magnitude sees no calibration item; leave iterative and text out"),
        ("magnitude-text", "leave iterative and text out"),
        ("random", "the number of its draw"),
        ("taylor-mlp-attention", "attention and mlp exclude each other"),
        ("taylor-text-text", "stands there twice"),
        ("last-iterative", "leave iterative"),
        ("", "a criterion"),
    ],
)
def test_wrong_names_are_refused_in_one_line(name, words):
    with pytest.raises(DermError, match=words) as caught:
        Ranking.of(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_rankings_come_once_and_without_the_published_plan():
    found = rankings(["taylor", "published", "random-1", "taylor"])
    assert [ranking.name for ranking in found] == ["taylor", "random-1"]


def test_units_are_blocks_or_their_parts():
    units = {
        end: measure.units_of(Ranking.of(f"last{end}"), 2)
        for end in ("", "-attention", "-mlp", "-sublayers")
    }
    assert units == {
        "": [0, 1], "-attention": ["0.attention", "1.attention"], "-mlp": ["0.mlp", "1.mlp"],
        "-sublayers": ["0.attention", "0.mlp", "1.attention", "1.mlp"],
    }  # fmt: skip


def test_protected_blocks_count_from_both_ends(pico):
    assert measure.protected_blocks(pico[0], [0, 1, -1]) == (0, 1, 7)
    with pytest.raises(DermError, match="blocks 0 to 7"):
        measure.protected_blocks(pico[0], [8])


# Orders


def test_iterative_scores_what_is_left_anew_and_the_first_step_once(calibration, monkeypatch):
    """Of the twins 3 and 4 either can go, but not both."""
    calls = scripted(
        monkeypatch, lambda gone, b: 9 if {*gone, b} >= {3, 4} else 1 if b in (3, 4) else b
    )
    names = ["block_influence", "block_influence-iterative"]
    plans, _ = ranked(
        names, dataclasses.replace(calibration, batch_size=6), most=4
    )  # both pictures at once
    once, anew = (plans[name] for name in names)
    assert once.order == (3, 4, 2, 5, 6) and once.scores == (1, 1, 2, 5, 6)
    assert anew.order == (3, 2, 5, 6) and anew.scores == (1, 2, 5, 6)
    assert [
        sum(gone == g for g, _ in calls) for gone in ((), (3,), (2, 3), (2, 3, 5), (2, 3, 5, 6))
    ] == [8, 4, 3, 2, 0]


def test_iterative_scores_are_those_of_the_model_without_the_earlier_ones(calibration):
    plans, _ = ranked(["perplexity-iterative"], calibration, most=3)
    plan, lost = plans["perplexity-iterative"], []
    for n in (1, 2, 3):
        with removal.without(calibration.model, plan.removed(n)):
            lost.append(perplexity_of(calibration))
    assert np.allclose(plan.scores, lost, rtol=1e-5)


def test_iterative_sublayers_keep_their_names_when_a_whole_block_is_gone(calibration):
    first = [f"3.{part}" for part in ("mlp", "attention")]
    rest = ["2.mlp", "4.attention", "6.mlp"]
    assert measure.positions(rest, first) == ["2.mlp", "3.attention", "5.mlp"]
    assert measure.positions(rest, first[:1]) == rest
    assert measure.positions([0, 4, 6], [5, 2]) == [0, 3, 4]
    ranking, journal = Ranking.of("perplexity-sublayers"), Journal()
    with removal.without(calibration.model, first):
        found = measure.rows(ranking, calibration, rest, journal=journal, removed=first)
    for unit, values in found.groupby("unit").value:
        with removal.without(calibration.model, [*first, unit]):
            lost = perplexity_of(calibration)
        assert values.mean() == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize("protected", [(0, 1, 7), (4,), ()])
def test_windows_are_the_least_of_all_that_spare_protected_blocks(calibration, protected):
    names = ["angular-contiguous", "perplexity-contiguous", "random-0-contiguous-unprotected"]
    plans, measured = ranked(names, calibration, protected=protected)
    for name, plan in plans.items():
        spared = () if "unprotected" in name else protected
        told = measured[measured.ranking == Ranking.of(name).base()]
        mean = told.groupby("block").value.mean()
        windows = [
            range(a, b)
            for a, b in itertools.combinations(range(9), 2)
            if not {*range(a, b)} & {*spared}
        ]
        score = {w: mean[list(w)].sum() for w in windows}
        if name.startswith("angular"):
            score = {
                w: np.mean([r[len(w) - 1] for r in told[told.block == w.start].runs])
                for w in windows
            }
        assert plan.most == max(map(len, windows)) and plan.order == ()
        for n in range(1, plan.most + 1):
            best = min((w for w in windows if len(w) == n), key=score.get)
            assert plan.removed(n) == tuple(best) and plan.scores[n - 1] == pytest.approx(
                score[best]
            )


def test_unprotected_spares_no_block_and_draws_differ(calibration):
    names = ["last", "last-unprotected", "random-0", "random-1", "last-sublayers"]
    plans, measured = ranked(names, calibration)
    assert plans["last"].order == (6, 5, 4, 3, 2) and plans["last"].protected == (0, 1, 7)
    assert (
        plans["last-unprotected"].order == (7, 6, 5, 4, 3, 2, 1, 0)
        and plans["last-unprotected"].protected == ()
    )
    assert plans["last-sublayers"].order[:3] == ("6.mlp", "6.attention", "5.mlp")
    assert plans["random-0"].order != plans["random-1"].order
    assert (measured.ranking == "last").sum() == 8, "what happens after scoring is not scored again"


def test_plans_say_how_they_were_made_and_survive_json(calibration):
    plans, _ = ranked(
        ["block_influence-text", "random-2", "angular-contiguous", "last-sublayers"], calibration
    )
    for plan in plans.values():
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        plan.check(blocks=8, fingerprint="f")
        for wrong in ({"blocks": 9, "fingerprint": "f"}, {"blocks": 8, "fingerprint": "g"}):
            with pytest.raises(
                DermError, match="made for a model of 8 blocks and fingerprint f, not for"
            ):
                plan.check(**wrong)
    with_answers, _ = ranked(
        ["output_similarity-iterative"], dataclasses.replace(calibration, embed=Named())
    )
    told = with_answers["output_similarity-iterative"].settings
    assert (told["embedder"], told["iterative_blocks"]) == ("by letters", 5)
    settings = plans["block_influence-text"].settings
    assert settings["items"] == ["train-00000", "train-00001"] and settings["text_only"]
    assert (
        settings["options"] == ["text"]
        and "Men et al." in settings["source"]
        and "answers" in settings["reads"]
    )
    assert "items" not in plans["random-2"].settings and plans["random-2"].settings["seed"] == 2


def test_the_published_plan_is_for_32_blocks(calibration):
    plan = published_plan()
    plan.check(blocks=32, fingerprint="any")
    assert plan.order == (
        23,
        4,
        18,
        22,
        21,
        24,
        17,
        27,
        20,
        26,
        19,
        29,
        28,
        5,
    ) and plan.protected == (0, 1, 31)
    assert plan.removed(3) == (4, 18, 23) and len(plan.kept(14)) == 18
    with pytest.raises(DermError, match="made for a model of 32 blocks"):
        plan.check(blocks=8, fingerprint="any")
    with pytest.raises(DermError, match="published: made for a model of 32 blocks"):
        ranked(["last", "published"], calibration)


def test_the_published_plan_needs_no_measuring(calibration):
    measured = measure.measure(["published"], calibration, Journal())
    assert measured.empty and measure.scores(measure.values(measured), (0,)).empty
    assert measure.similarity(measured).empty


def test_magnitude_takes_the_lightest_blocks_first(calibration):
    weights = [9, 8, 5, 1, 4, 2, 3, 7]
    with torch.no_grad():
        for block, weight in zip(anatomy.blocks(calibration.model), weights, strict=True):
            for parameter in block.parameters():
                parameter.zero_()
            block.mlp.up_proj.weight[1, 1] = -weight
    plans, _ = ranked(["magnitude"], calibration)
    assert plans["magnitude"].order == (3, 5, 6, 4, 2) and plans["magnitude"].scores == (
        1,
        2,
        3,
        4,
        5,
    )


def test_the_studys_own_ranking_removes_blocks():
    with pytest.raises(DermError, match="the first, last-mlp, is the study's own"):
        rankings(["last-mlp", "magnitude"])
    assert [r.parts for r in rankings(["magnitude", "last-mlp"])] == [(), ("mlp",)]


def test_without_pictures_all_questions_are_alike(calibration):
    """Output similarity then has one result a unit and question; perplexity reads the items' answers."""
    names = ["output_similarity-text", "perplexity-text"]
    found = measure.measure(names, calibration, Journal()).groupby("ranking").item.unique()
    assert found["output_similarity-text"].tolist() == [""] and len(found["perplexity-text"]) == 2


def test_values_that_are_no_numbers_are_refused(calibration):
    with torch.no_grad():
        anatomy.blocks(calibration.model)[4].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DermError, match="ranking magnitude: unit 4 gives nan"):
        measure.measure(["magnitude"], calibration, Journal())


# Journal


@pytest.mark.parametrize("name", ["perplexity", "block_influence", "angular", "output_similarity"])
def test_a_stopped_ranking_ends_in_the_same_bytes_whatever_its_batches(
    calibration, dataset, tmp_path, name
):
    c = dataclasses.replace(
        calibration, items=dataset.of("train")[:5], batch_size=9
    )  # batches of 3 and 2 items
    whole = measure.rows(Ranking.of(name), c, [2, 3], journal=Journal())

    class Cut(Journal):
        def add(self, key, row):
            if len(self.done) == len(whole) // 2 - 1:
                raise KeyboardInterrupt
            super().add(key, row)

    with pytest.raises(KeyboardInterrupt):
        measure.rows(Ranking.of(name), c, [2, 3], journal=Cut(tmp_path / "log.jsonl"))
    again = measure.rows(Ranking.of(name), c, [2, 3], journal=Journal(tmp_path / "log.jsonl"))
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


@pytest.mark.parametrize("name", ["perplexity", "output_similarity", "taylor-mlp"])
def test_a_stopped_ranking_goes_on_and_computes_only_what_is_missing(
    calibration, monkeypatch, tmp_path, name
):
    ranking, computed = Ranking.of(name), []
    units = [
        unit for unit in measure.units_of(ranking, 8) if removal.span(unit)[0] // 2 in (2, 3, 4)
    ]
    inner = criteria.CRITERIA[ranking.criterion].rows

    def counted(c, units):
        for row in inner(c, units):
            computed.append((row["unit"], row["item"]))
            yield row

    replaced = dataclasses.replace(criteria.CRITERIA[ranking.criterion], rows=counted)
    monkeypatch.setitem(criteria.CRITERIA, ranking.criterion, replaced)
    whole = measure.rows(ranking, calibration, units, journal=Journal())
    per_item = len(whole) // 2
    assert (
        len(computed) == len(whole) == 2 * 3 * len(criteria.CRITERIA[ranking.criterion].questions)
    )

    class Cut(Journal):
        def add(self, key, row):
            if len(self.done) == per_item + 1:
                raise KeyboardInterrupt
            super().add(key, row)

    with pytest.raises(KeyboardInterrupt):
        measure.rows(ranking, calibration, units, journal=Cut(tmp_path / "log.jsonl"))
    computed.clear()
    again = measure.rows(ranking, calibration, units, journal=Journal(tmp_path / "log.jsonl"))
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    assert {item for _, item in computed} == {calibration.items[1].id}
    assert len(computed) == per_item - (
        not criteria.CRITERIA[ranking.criterion].by_question
    )  # whole units
    computed.clear()
    measure.rows(ranking, calibration, units, journal=Journal(tmp_path / "log.jsonl"))
    assert computed == []


def test_of_a_cut_batch_only_the_units_that_lack_a_result_are_computed(
    calibration, dataset, monkeypatch, tmp_path
):
    c, computed = (
        dataclasses.replace(calibration, items=dataset.of("train")[:4], batch_size=6),
        [],
    )  # two items a batch
    ranking, inner = Ranking.of("perplexity"), criteria.perplexity

    def counted(c, units):
        computed.extend(itertools.product(units, (item.id for item in c.items)))
        return inner(c, units)

    monkeypatch.setitem(
        criteria.CRITERIA,
        "perplexity",
        dataclasses.replace(criteria.CRITERIA["perplexity"], rows=counted),
    )
    whole = measure.rows(ranking, c, [2, 3, 4], journal=Journal())
    kept = Journal(tmp_path / "log.jsonl")
    full = Journal()
    measure.rows(ranking, c, [2, 3, 4], journal=full)
    for key in list(full.done)[
        :7
    ]:  # unit 4, the first one done, of the first batch; and one answer without unit 3
        kept.add(key, full.done[key])
    computed.clear()
    again = measure.rows(ranking, c, [2, 3, 4], journal=kept)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    one, two, three, four = (item.id for item in c.items)
    assert set(computed) == {
        *itertools.product([2, 3], [one, two]),
        *itertools.product([2, 3, 4], [three, four]),
    }


def letters(text):
    """Unit vector of how often each letter occurs: likeness by degrees."""
    counts = np.bincount(np.frombuffer(f" {text}".encode(), np.uint8), minlength=256)
    return counts / np.linalg.norm(counts)


class Named:
    """An embedder with a name."""

    name = "by letters"

    def __call__(self, text):
        return letters(text)


def test_iterative_output_similarity_compares_with_the_whole_model(calibration):
    c = dataclasses.replace(calibration, items=calibration.items[:1], embed=letters)
    fit_head(c)
    plans, _ = ranked(["output_similarity-iterative"], c, most=2)
    plan, said = plans["output_similarity-iterative"], []
    how = {"variant": "x", "batch_size": 3, "max_new_tokens": 6}
    for n in range(3):
        with removal.without(c.model, plan.removed(n)):
            said.append(answers.answer(c.model, c.processor, c.items, c.images, **how).answer)
    lost = [
        [np.mean([1 - letters(x) @ letters(y) for x, y in zip(a, b, strict=True)]) for a in said]
        for b in said
    ]
    assert plan.scores == pytest.approx(lost[0][1:]) and abs(lost[0][2] - lost[1][2]) > 1e-3


def test_the_whole_models_answers_are_kept_one_by_one(calibration, tmp_path, monkeypatch):
    ranking = Ranking.of("output_similarity-iterative")
    c, asked, inner = (
        dataclasses.replace(calibration, batch_size=3),
        [],
        criteria.Calibration.written,
    )
    whole = measure.whole_answers(ranking, c, Journal())

    def counted(c, units):
        asked.append([item.id for item in c.items])
        yield from inner(c, units)

    class Cut(Journal):
        def add(self, key, row):
            if len(self.done) == 4:
                raise KeyboardInterrupt
            super().add(key, row)

    with pytest.raises(KeyboardInterrupt):
        measure.whole_answers(ranking, c, Cut(tmp_path / "log.jsonl"))
    monkeypatch.setattr(criteria.Calibration, "written", counted)
    journal = Journal(tmp_path / "log.jsonl")
    assert len(journal.done) == 4 and measure.whole_answers(ranking, c, journal) == whole
    assert asked == [[c.items[1].id]] and len(journal.done) == len(whole) == 2 * 3


# Frames


def told(values, ranking="x"):
    rows = [
        {
            "ranking": ranking,
            "unit": str(b),
            "block": b,
            "part": "block",
            "item": item,
            "question": q,
            "value": v + d,
        }
        for b, v in enumerate(values)
        for item, q, d in (("a", "name", 0.0), ("a", "features", 1.0), ("b", "name", 2.0))
    ]
    return pd.DataFrame(rows)


def test_values_are_means_over_questions_and_scores_over_pictures():
    values = measure.values(told([1.0, 2.0]))
    assert values.value.tolist() == [1.5, 3.0, 2.5, 4.0] and values.item.tolist() == [
        "a",
        "b",
        "a",
        "b",
    ]
    assert measure.scores(values, []).score.tolist() == [2.25, 3.25]


def test_ranks_protect_and_break_ties_by_position():
    frame = pd.concat([told([5.0, 1.0, 2.0, 2.0, 0.5]), told([0.0, 3.0, 2.0, 1.0, 0.0], "y")])
    scores = measure.scores(measure.values(frame), [0, 4])
    ranks = {name: rows["rank"].tolist() for name, rows in scores.groupby("criterion")}
    assert ranks["x"][1:4] == [0, 1, 2] and ranks["y"][1:4] == [2, 1, 0]
    assert all(np.isnan(rank[b]) for rank in ranks.values() for b in (0, 4))


def test_measured_units_know_their_block_and_part_and_orders_agree(calibration):
    names = ["perplexity", "magnitude-sublayers"]
    plans, measured = ranked(names, calibration)
    parts = measured[measured.ranking == "magnitude-sublayers"]
    assert parts.unit.tolist()[:3] == ["0.attention", "0.mlp", "1.attention"]
    assert parts.block.tolist()[:3] == [0, 0, 1] and parts.part.tolist()[:3] == [
        "attention",
        "mlp",
        "attention",
    ]
    scores = measure.scores(measure.values(measured), (0, 1, 7)).dropna().sort_values("rank")
    assert tuple(scores[scores.criterion == "perplexity"].block) == plans["perplexity"].order
    named = scores[scores.criterion == "magnitude-sublayers"]
    assert tuple(named.block.astype(str) + "." + named.part) == plans["magnitude-sublayers"].order


def test_similarity_keeps_the_answers_behind_the_values(calibration):
    _, measured = ranked(["output_similarity", "last"], calibration)
    similarity = measure.similarity(measured)
    assert len(similarity) == 8 * 2 * 3 and (similarity.accepted <= similarity.tokens).all()
    own = measure.whole_answers(Ranking.of("output_similarity-iterative"), calibration, Journal())
    same = [own[row.item, row.question] == row.answer for row in similarity.itertuples()]
    assert (similarity.similarity[same] == 1).all() and 0 < sum(same) < len(same)
    assert measure.similarity(measured[measured.ranking == "last"]).empty
