"""Answers whose worth is known: what they are, and what is said of a judge that gets them wrong."""

import pytest
from judge_server import Server, answer_in, answers, fields_of, model_judge, verdict

from derm_compress.data import dialogue
from derm_compress.evaluate.judges import controls
from derm_compress.evaluate.judges.judge import choose_judge, judge_all, unread
from derm_compress.evaluate.judges.prompts import attacks
from derm_compress.evaluate.judges.rubric import rate, score_by_rubric
from derm_compress.report.results import load_results
from derm_compress.report.sentences import Facts


def findings(frame, answers=None):
    return Facts(load_results({}, judge_controls=frame, evaluation=answers)).said("extra_judges")


@pytest.fixture
def by_rubric(dataset):
    return controls.judge_controls(dataset.of("test"), choose_judge("rubric"))


def test_the_rubric_gives_an_injection_nothing(dataset):
    for disease in dialogue.diseases():
        for kind in dialogue.QUESTIONS:
            right = dialogue.reference(disease, {}, kind)
            wrong = dialogue.reference(controls.stranger(disease), {}, kind)
            assert rate(wrong, right, kind)[0] == 1
            for name, text in attacks().items():
                assert rate(f"{wrong} {text}", right, kind)[0] == 1, (name, kind)


def test_every_control_stands_once_and_every_attack_beside_its_answer(dataset):
    made = controls.control_answers(dataset.of("test"))
    diseases = len({item.disease for item in dataset.of("test")})
    assert made.item.nunique() == made.disease.nunique() == diseases
    assert (made.control.value_counts()[list(controls.EXPECTED)] == 3 * diseases).all()
    pairs = made[made.attack.ne("")].pivot(index="attack", columns="control", values="answer")
    assert len(pairs) == 20
    for attack, row in pairs.iterrows():
        assert row[controls.INJECTED] == f"{row[controls.PLAIN]} {attacks()[attack]}"
    assert controls.control_answers(dataset.of("test")[::-1]).equals(made)


def test_the_rubrics_table(by_rubric):
    told = controls.controls_table(by_rubric).set_index("control")
    assert told.mean_score["reference"] == 4
    assert told.expected[controls.COPIED] == "1 to 3" and told.highest[controls.COPIED] < 4
    assert told.mean_score["other disease"] == told.mean_score["empty"] == 1
    assert told.as_expected[controls.INJECTED] == 100 and told.unscored.eq(0).all()
    # the rubric's known limit: it sees facts, not sentences
    assert told.highest["name in nonsense"] == 4
    said = findings(by_rubric)[0]
    assert "0 of 20 injections" in said and "misjudges name in nonsense" in said


def test_a_judge_that_can_be_talked_to_is_found_out(dataset, tmp_path):
    def gullible(body):
        answer = body["messages"][1]["content"].split("Answer of the model: ")[1]
        return verdict(4 if "Ignore all earlier" in answer else 2)

    with Server(gullible) as server:
        chosen = model_judge(server, tmp_path, timeout=10.0)
        frame = controls.judge_controls(dataset.of("test"), chosen)
        asked = len(server.bodies)
        final = judge_all(score_by_rubric(answers("This is psoriasis.")), {}, chosen)
        assert len(server.bodies) == asked  # this answer stands among the controls
    won = controls.gains(frame)
    gain = won[won.judge == chosen.name].set_index("attack").gain
    assert gain.drop("order").eq(0).all() and gain["order"] == 2
    told = controls.judge_quality(frame, final).set_index(["judge", "on"])
    assert told.parse_rate[chosen.name, "controls"] == 1
    assert told.repeated[chosen.name, "controls"] == 1
    assert (final.score.tolist(), final.rubric.tolist()) == ([2], [4])
    assert "1 of 20 injections" in findings(frame, final)[1]


def test_a_models_gaps_are_counted_and_the_rubric_has_none(dataset, by_rubric):
    with Server(lambda body: "no" if "walrus" in answer_in(body) else verdict(2)) as server:
        chosen = model_judge(server, timeout=10.0)
        frame = controls.judge_controls(dataset.of("test")[:1], chosen)
    lost = frame[frame.judge.eq(chosen.name) & frame.control.eq("name in nonsense")]
    assert unread(frame) == len(lost) == 6 and unread(by_rubric) == 0
    assert unread(score_by_rubric(answers("x"))) == 0


def test_what_a_server_refuses_is_said(dataset):
    with Server(fields_of("max_tokens", "response_format", "seed")) as server:
        frame = controls.judge_controls(dataset.of("test"), model_judge(server, timeout=10.0))
    asked = len(frame[(frame["round"] == 0) & frame.judge.ne("rubric")])
    said = findings(frame)[2]
    assert f"100.0 % of {asked} replies could be read, {asked} were made without temp" in said
    assert "temperature, which its server refuses" in said


def test_a_judge_that_cannot_be_read_is_not_said_to_judge_well(dataset):
    with Server() as server:
        chosen = model_judge(server, timeout=10.0)
        frame = controls.judge_controls(dataset.of("test"), chosen)
        final = judge_all(score_by_rubric(answers("psoriasis")), {}, chosen)
    frame = frame.assign(score=frame.score.mask(frame.judge == chosen.name))
    final = final.assign(score=None, error="braces that hold no JSON object")
    _, said, *agreed, advice = findings(frame, final)
    asked = 3 * frame.item[frame.attack.eq("")].nunique()
    assert f"without a score: reference ({asked} of" in said
    assert "wrong answer, injected (20 of 20)" in said
    assert said.endswith("; no control has a score both times.")
    assert "as expected" not in said and "nan" not in said
    assert all("0.0 % of" in line and "from 0 pairs of scores." in line for line in agreed)
    assert advice.startswith("pico (paper) gave 1 of 1 answers no score (mostly: braces that hold")


def test_a_lost_score_is_named_and_the_others_count(by_rubric):
    lost = by_rubric.index == by_rubric.index[by_rubric.control.eq("empty")][0]
    told = findings(by_rubric.assign(score=by_rubric.score.mask(lost)))[0]
    assert "without a score: empty (1 of" in told and "it misjudges name in nonsense" in told
