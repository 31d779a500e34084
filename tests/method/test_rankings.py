"""Names of rankings."""

import pytest

from derm_compress.errors import DermError
from derm_compress.method.importance.rankings import Ranking, criteria_used, rankings


@pytest.mark.parametrize(
    ("name", "criterion", "options", "draw", "base"),
    [
        ("taylor", "taylor", (), 0, "taylor"),
        ("random-3", "random", (), 3, "random-3"),
        ("random-unprotected-12", "random", ("unprotected",), 12, "random-12"),
        ("angular-contiguous", "angular", ("contiguous",), 0, "angular"),
        ("perplexity-iterative-text", "perplexity", ("text", "iterative"), 0, "perplexity-text"),
        ("output_similarity-mlp", "output_similarity", ("mlp",), 0, "output_similarity-mlp"),
    ],
)
def test_names_say_criterion_and_options(name, criterion, options, draw, base):
    ranking = Ranking.of(name)
    assert (ranking.criterion.name, ranking.options, ranking.draw) == (criterion, options, draw)
    assert ranking.base == base


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("perplexty", "did you mean perplexity"),
        ("zzz", "a criterion .output_similarity, perplexity, .* and options .text, iterative, "),
        ("perplexity-text-often", "and options"),
        ("taylor-2", "only random has draws"),
        ("random-1-2", "the number of its draw"),
        ("random-²", "and options"),
        ("angular-contiguous-iterative", "ranked once; leave contiguous out"),
        ("angular-mlp-contiguous", "runs are of blocks"),
        ("magnitude-iterative", "magnitude sees no calibration item; leave iterative and text out"),
        ("random", "the number of its draw"),
        ("taylor-mlp-attention", "attention and mlp exclude each other"),
        ("taylor-text-text", "stands there twice"),
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


def test_the_studys_own_ranking_removes_blocks():
    with pytest.raises(DermError, match="the first, last-mlp, is the study's own"):
        rankings(["last-mlp", "magnitude"])
    assert [r.parts for r in rankings(["magnitude", "last-mlp"])] == [(), ("mlp",)]


def test_units_are_blocks_or_their_parts():
    units = {
        option: " ".join(map(str, Ranking.of(f"last{option}").units(2)))
        for option in ("", "-attention", "-mlp", "-sublayers")
    }
    assert units == {
        "": "0 1",
        "-attention": "0.attention 1.attention",
        "-mlp": "0.mlp 1.mlp",
        "-sublayers": "0.attention 0.mlp 1.attention 1.mlp",
    }


def test_criteria_that_are_used_say_what_they_read():
    frame = criteria_used(["output_similarity", "output_similarity-mlp", "magnitude", "published"])
    assert list(frame.index) == ["output_similarity", "magnitude"]
    assert frame.reads.tolist() == ["questions", ""] and "Eqs. 2-5" in frame.source.iloc[0]
