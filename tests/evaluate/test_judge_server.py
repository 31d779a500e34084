"""A model behind a server, with and without faults; the key; what is kept of its replies."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import KEY, Server, answers, model_judge, pico_judge, verdict

from derm_compress.errors import DermError
from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges.judge import choose_judge, judge_all, parse_rate
from derm_compress.evaluate.judges.prompts import judge_prompt
from derm_compress.evaluate.judges.rubric import score_by_rubric
from derm_compress.evaluate.judges.server import SIZE, ChatServer
from derm_compress.study import params

NO_ADDRESS = [
    "",
    "localhost:8000",
    "file:///etc",
    f"http://u:{KEY}@a/v1",
    f"http://a/v1?key={KEY}",
    "http://[::1/v1",
    "http://127.0.0.1:abc/v1",
    f"http://[::1/v1?key={KEY}",
    f"http://a:{KEY}/v1",
    "http://a:99999/v1",
]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing for this machine goes there
    for name in ("DERM_COMPRESS_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_a_real_models_digits_become_scores(pico, tmp_path):
    model, processor = pico
    frame = answers("This is psoriasis.", "This is melanoma.", "", "<script>alert(1)</script>")
    with Server(pico_judge(model, processor.tokenizer)) as server:
        told = model_judge(server, tmp_path, timeout=30.0).judged(frame)
    assert told.score.between(1, 4).all() and set(told.error) == {""}
    assert set(told.served) == {"pico"} and set(told.judge) == {"pico (paper)"}
    marks = [json.loads(text)["score"] for text in told.reply]
    assert marks == told.score.tolist() == told.value.tolist() and parse_rate(told) == 1
    body = server.bodies[0]
    assert (body["temperature"], body["seed"], body["model"]) == (0, 0, "pico")
    assert body["response_format"]["json_schema"]["schema"] == judge_prompt("paper").schema()


@pytest.mark.parametrize("fault", ["slow", "trickle", "broken", "cut"])
def test_a_fault_is_tried_again(fault):
    with Server(faults=[fault]) as server:
        told = model_judge(server).judged(answers("x"))
    assert told.score.tolist() == [3] and told.error.tolist() == [""] and len(server.bodies) == 2


@pytest.mark.parametrize("fault", ["broken", "endless", "packed"])
def test_a_fault_that_stays_is_an_error_and_no_score(fault, tmp_path):
    with Server(faults=[fault] * 2) as server:
        told = model_judge(server, tmp_path, retries=1).judged(answers("x"))
        assert told.score.isna().all() and told.error[0] and len(server.bodies) == 2
        assert parse_rate(told) == 0 and metrics.unscored(told) == 1
        assert len(told.reply[0]) < SIZE
        again = model_judge(server, tmp_path).judged(answers("x"))
    assert again.score.tolist() == [3]  # what got no reply was not kept


@pytest.mark.parametrize(
    "fault, says",
    [
        ("closed", "status 429"),  # wants to be left alone until 2100
        ("moved", "status 302"),
        ("bad request", "status 400"),
        ("garbage", "no chat completion"),
        ("no completion", "no chat completion"),
        ("no text", "without text"),
    ],
)
def test_what_another_try_would_not_mend_is_not_asked_again(fault, says):
    with Server(faults=[fault]) as server:
        told = model_judge(server).judged(answers("x"))
    assert told.score.isna().all() and says in told.error[0] and len(server.bodies) == 1


def test_retry_after_is_kept_to():
    with Server(faults=["busy"]) as server:
        begun = time.monotonic()
        assert model_judge(server).judged(answers("x")).score.tolist() == [3]
        assert time.monotonic() - begun >= 1


def test_a_reply_that_cannot_be_read_is_kept_and_not_asked_for_again(tmp_path):
    with Server(lambda body: "I give it a 4.") as server:
        for _ in range(2):
            told = model_judge(server, tmp_path).judged(answers("x"))
            assert told.score.isna().all() and told.error[0]
            assert told.reply.tolist() == ["I give it a 4."]
    assert len(server.bodies) == 1


def test_a_dead_server_ends_the_run_with_advice_and_keeps_what_was_judged(tmp_path):
    frame = answers(*(f"answer {n}" for n in range(40)))
    with Server(faults=[None, None, *["bad request"] * 40]) as server:
        with pytest.raises(DermError, match=r"5 answers in a row failed.*run again"):
            model_judge(server, tmp_path, concurrency=1).judged(frame)
        assert len(server.bodies) < 12
        server.faults.clear()
        server.bodies.clear()
        assert model_judge(server, tmp_path).judged(frame).score.eq(3).all()
        assert len(server.bodies) == 38


def test_no_more_requests_at_once_than_asked_for():
    frame = answers(*(f"answer {n}" for n in range(12)))
    with Server(seconds=0.2) as server:
        model_judge(server, concurrency=3, timeout=5.0).judged(frame)
    assert server.at_once == 3 and len(server.bodies) == 12


def test_nothing_is_judged_twice(tmp_path):
    frame = answers("a", "b", "a")
    frame.loc[2, ["variant", "item"]] = ["pruned-6", "i0"]
    with Server() as server:
        first = model_judge(server, tmp_path).judged(frame)
        assert len(server.bodies) == 2  # the same answer of another variant is the same task
        assert model_judge(server, tmp_path).judged(frame).equals(first)
        assert len(server.bodies) == 2
        model_judge(server, tmp_path, prompt="ten").judged(frame)
        model_judge(server, tmp_path).judged(frame.assign(reference="This is melanoma."))
        model_judge(server, tmp_path).judged(frame.assign(round=1))
    assert len(server.bodies) == 8


def test_a_cut_off_journal_goes_on(tmp_path):
    with Server() as server:
        model_judge(server, tmp_path).judged(answers("a", "b"))
        (path,) = tmp_path.glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-20])
        assert model_judge(server, tmp_path).judged(answers("a", "b")).score.eq(3).all()
    assert len(server.bodies) == 3


def test_the_earlier_stages_answers_are_judged_too(tmp_path):
    earlier = score_by_rubric(answers("psoriasis", "melanoma").assign(variant="pruned-6"))
    (tmp_path / "04_pruning").mkdir()
    earlier.to_parquet(tmp_path / "04_pruning" / "answers.parquet")
    mine, folders = score_by_rubric(answers("psoriasis")), {"04_pruning": tmp_path / "04_pruning"}
    assert judge_all(mine, folders, choose_judge("rubric")) is mine
    with Server() as server:
        final = judge_all(mine, folders, model_judge(server))
    assert final.variant.tolist() == ["pruned-6", "pruned-6", "original"]
    assert final.rubric.tolist() == [4, 1, 4] and final.score.eq(3).all()
    assert len(server.bodies) == 2


@pytest.mark.parametrize("name", ["DERM_COMPRESS_JUDGE_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_appears_nowhere(name, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.setenv(name, KEY)
    caplog.set_level(logging.DEBUG)
    with Server(lambda body: verdict(3, reason=f"key {KEY}"), faults=["bad request"]) as server:
        told = model_judge(server, tmp_path, concurrency=1).judged(answers("a", "b"))
        assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
        server.faults[:] = ["refused"]
        with pytest.raises(DermError, match="401") as refused:
            model_judge(server).judged(answers("a"))
        server.faults[:] = ["bad request"] * 9
        with pytest.raises(DermError, match="in a row") as failed:
            model_judge(server).judged(answers(*"abcdefgh"))
    kept = [path.read_text() for path in tmp_path.rglob("*.jsonl")]
    seen = [*kept, told.to_json(), caplog.text, str(refused.value), str(failed.value)]
    seen = "".join([*seen, repr(ChatServer("m", server.url)), *capsys.readouterr()])
    assert len(told) == 2 and "[key]" in seen and KEY not in seen


def test_a_reply_cut_inside_the_key_shows_none_of_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(faults=["long"]) as server:
        told = model_judge(server).judged(answers("a"))
    assert told.reply[0].startswith("garbage") and KEY[:6] not in told.reply[0]


def test_nothing_else_of_the_environment_is_sent(monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "mine-alone")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: mine-alone")
    with Server() as server:
        model_judge(server).judged(answers("a"))
    assert "mine-alone" not in str(server.headers) and "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "key, url, says",
    [
        (KEY, "http://judge.example/v1", "https"),  # in the clear, to another machine
        (f"{KEY}\nX-Other: 1", "https://judge.example/v1", "OPENAI_API_KEY holds"),
    ],
)
def test_a_key_that_may_not_be_sent_is_named_and_not_shown(key, url, says, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(DermError, match=says) as error:
        list(ChatServer("m", url).replies({"k": []}, judge_prompt("paper")))
    assert KEY not in str(error.value)


@pytest.mark.parametrize("url", [*NO_ADDRESS, "http://a\x00/v1", "http://\u2488/v1"])
def test_an_address_is_an_address(url):
    with pytest.raises(DermError, match="judge_url") as error:
        choose_judge("openai", model="m", url=url)
    assert KEY not in str(error.value)


def test_an_address_is_checked_with_any_judge_before_a_notebook_holds_it():
    known = params.known_parameters(params.read_notebooks(Path(__file__).parents[2]))
    for url in NO_ADDRESS:
        with pytest.raises(DermError, match="here: judge_url") as error:
            params.check({"judge": "rubric", "judge_url": url}, known, "here")
        assert KEY not in str(error.value)
    for url in ("http://127.0.0.1:8000/v1", "https://judge.example/v1", "http://[::1]:8000/v1"):
        assert params.check({"judge_url": url}, known, "here") == {"judge_url": url}


def test_a_judge_that_cannot_work_is_refused():
    with pytest.raises(DermError, match="rubric, openai"):
        choose_judge("human")
    with pytest.raises(DermError, match="judge_model"):
        choose_judge("openai", url="http://127.0.0.1/v1")
    with pytest.raises(DermError, match="aspects"):
        choose_judge("openai", model="m", url="http://127.0.0.1/v1", prompt="paper2")


def test_the_client_is_imported_only_where_it_is_used():
    code = "import sys, derm_compress.evaluate.judges.controls, derm_compress.evaluate.secondary\n"
    code += "assert not {'openai', 'httpx2', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
