"""A model behind a server, with and without faults; the key; what is kept of its replies."""

import json
import logging
import signal
import threading
import time
from pathlib import Path

import pytest
from judge_server import (
    KEY,
    Server,
    answer_in,
    answers,
    fields_of,
    model_judge,
    openai_refusal,
    pico_judge,
    pydantic_refusal,
    verdict,
    vllm_refusal,
)

from derm_compress.errors import DermError
from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges.client import SIZE
from derm_compress.evaluate.judges.judge import choose_judge, judge_all, parse_rate
from derm_compress.evaluate.judges.prompts import judge_prompt
from derm_compress.evaluate.judges.rubric import score_by_rubric
from derm_compress.evaluate.judges.server import ChatServer
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
    "http://a\x00/v1",
    "http://\u2488/v1",
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
        ("no text", "no JSON object with score"),
        ("broken in parts", "status 400"),  # names a field, and not as what it refuses
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


def rude(*words):
    """A server that cannot be read where the answer has one of these words."""

    def answering(body):
        wild = any(word in answer_in(body) for word in words)
        return f"\x1b[31mI\u202e give it a 4.\n{'x' * 500}" if wild else verdict(3)

    return answering


def test_what_cannot_be_read_is_asked_again_and_what_can_is_not(tmp_path):
    frame = answers("good", "bad", "good too")
    with Server(rude("bad")) as server:
        first = model_judge(server, tmp_path).judged(frame)
        assert first.score.notna().tolist() == [True, False, True] and len(server.bodies) == 3
        assert "I" in first.reply[1] and "no JSON object" in first.error[1]
        server.answer = lambda body: verdict(4)
        again = model_judge(server, tmp_path).judged(frame)
        assert again.score.tolist() == [3, 4, 3] and len(server.bodies) == 4
        server.answer = rude("bad", "good")
        assert model_judge(server, tmp_path).judged(frame).equals(again)
    assert len(server.bodies) == 4


def test_a_judge_that_cannot_be_read_ends_the_run_and_is_quoted(tmp_path):
    frame = answers(*(f"answer {n}" for n in range(40)))
    with Server(rude("answer 1", "answer 2", "answer 3")) as server:
        with pytest.raises(DermError) as stopped:
            model_judge(server, tmp_path, concurrency=1).judged(frame)
        line = str(stopped.value)
        assert "5 replies in a row give no score (no JSON object with score)" in line
        assert '"[31mI give it a 4. xxxx' in line and line.isprintable() and len(line) < 500
        assert len(server.bodies) < 20
        server.answer = lambda body: verdict(4)  # somebody mended it
        server.bodies.clear()
        assert model_judge(server, tmp_path).judged(frame).score.isin([3, 4]).all()
        asked = ["".join(message["content"] for message in b["messages"]) for b in server.bodies]
        assert not any('"answer 0"' in text for text in asked)  # it had been read


def test_a_few_that_can_never_be_read_do_not_stop_a_later_run(tmp_path):
    frame = answers(*(f"{'good' if n % 2 else 'bad'} {n}" for n in range(14)))
    with Server(rude("bad")) as server:
        for turn in (1, 2):
            told = model_judge(server, tmp_path, concurrency=1).judged(frame)
            assert told.score.notna().sum() == 7 and len(server.bodies) == 7 + 7 * turn


@pytest.mark.parametrize("stopped", [DermError, KeyboardInterrupt])
def test_what_arrives_after_the_end_is_kept(stopped, tmp_path, request):
    """Three replies are under way when others that say nothing, or Ctrl-C, end the run."""

    def slow_where_it_can_be_read(body):
        if "good" in answer_in(body):
            time.sleep(0.4)
            return verdict(3)
        if stopped is KeyboardInterrupt:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return "I give it a 4."

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    bad = 1 if stopped is KeyboardInterrupt else 9
    frame = answers(*(f"good {n}" for n in range(3)), *(f"bad {n}" for n in range(bad)))
    with Server(slow_where_it_can_be_read) as server:
        with pytest.raises(stopped):
            model_judge(server, tmp_path, timeout=5.0).judged(frame)
        server.answer = lambda body: verdict(4)
        server.bodies.clear()
        told = model_judge(server, tmp_path).judged(frame)
    assert told.score.tolist() == [3] * 3 + [4] * bad and len(server.bodies) == bad


def test_an_older_journal_is_read_and_its_unreadable_replies_with_new_eyes(tmp_path):
    frame = answers("a", "b", "c")
    with Server() as server:
        chosen = model_judge(server, tmp_path)
        chosen.judged(frame)
        (path,) = tmp_path.glob("*.jsonl")
        keys = [json.loads(line)[0] for line in path.read_text().splitlines()]
        told = [f"so</think>{verdict(2)}", "I give it a 4.", {"no": "reply"}]
        kept = [[told[0], "", "pico"], [told[1], "", "pico"], told[2]]
        lines = [json.dumps(pair) for pair in zip(keys, kept, strict=True)]
        path.write_text("".join(line + "\n" for line in lines))
        server.bodies.clear()
        assert sorted(model_judge(server, tmp_path).judged(frame).score) == [2, 3, 3]
    assert len(server.bodies) == 2


# Habits of servers


@pytest.mark.parametrize("refusal", [openai_refusal, vllm_refusal, pydantic_refusal])
@pytest.mark.parametrize(
    "known",
    [
        ("max_completion_tokens", "response_format"),
        ("max_tokens", "temperature", "seed"),
        ("response_format", "temperature", "max_tokens"),
        (),
    ],
)
def test_fields_that_a_server_refuses_are_left_out_once_and_told(known, refusal, capsys):
    frame = answers(*(f"answer {n}" for n in range(9)))
    with Server(fields_of(*known, refusal=refusal)) as server:
        judge = model_judge(server, timeout=10.0, concurrency=3)
        assert judge.judged(frame).score.eq(3).all()
        told = capsys.readouterr().out.splitlines()
        sent = [set(body) - {"model", "messages"} for body in server.bodies]
        assert sent[-1] == set(known)
        lost = [field for field in sent[0] if field not in known]
        lost += ["max_completion_tokens"] * ("max_completion_tokens" not in sent[-1]) * (not known)
        assert len(told) == len(lost) and all("refuses" in line for line in told)
        assert len(server.bodies) <= 9 + 3 * len(told)
        asked = len(server.bodies)
        judge.judged(answers("another"))  # remembered for the run
        assert len(server.bodies) == asked + 1 and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("seed", "Unrecognized request argument supplied: seed"),
        ("temperature", "`temperature` is deprecated for this model, see max_tokens and seed"),
        ("seed", 'Invalid JSON payload. Unknown name "seed": Cannot find field; temperature is 0'),
        ("response_format", "This response_format type is unavailable now"),
        ("seed", "this model takes temperature, max_tokens; seed isn't supported"),
        ("temperature", "temperature does not currently accept 0"),
    ],
)
def test_a_refusal_without_a_param_is_told_by_its_words(field, said):
    def refusing(body):
        return (400, {"error": {"message": said, "param": None}}) if field in body else verdict(3)

    with Server(refusing) as server:
        assert model_judge(server).judged(answers("x")).score.tolist() == [3]
    assert len(server.bodies) == 2 and server.bodies[0].keys() - server.bodies[1].keys() == {field}


@pytest.mark.parametrize(
    "error",
    [
        {"message": "the prompt with temperature and seed is too long", "param": None},
        {"message": "seed: 0, temperature: 0. " + "x" * 60 + " is not allowed", "param": None},
        {"message": "temperature failed", "type": "invalid_request_error"},
        {"message": "temperature is not supported with this key", "param": "model"},
        {"message": "you have no seed money left"},
        "temperature",
    ],
)
def test_a_fault_that_only_names_a_field_refuses_none(error):
    with Server(lambda body: (400, {"error": error})) as server:
        told = model_judge(server).judged(answers("x", "y"))
    assert told.error.eq("status 400").all() and len(server.bodies) == 2
    assert all({"temperature", "seed", "max_tokens"} <= set(body) for body in server.bodies)


def test_a_reply_says_what_it_was_made_without_also_later(tmp_path):
    with Server(fields_of("max_completion_tokens", "response_format")) as server:
        first = model_judge(server, tmp_path).judged(answers("a"))
    with Server() as server:
        told = model_judge(server, tmp_path).judged(answers("a", "b"))
    assert first.without.tolist() == ["temperature seed"]
    assert told.without.tolist() == ["temperature seed", ""] and len(server.bodies) == 1


def test_a_longer_limit_is_sent_and_asks_nothing_twice(tmp_path):
    def short(body):
        cut = {"message": {"content": verdict(4)[:20]}, "finish_reason": "length"}
        return verdict(3) if body["max_tokens"] >= 4000 else cut

    with Server(lambda body: verdict(2)) as server:
        model_judge(server, tmp_path).judged(answers("a"))
        server.answer = short
        told = model_judge(server, tmp_path).judged(answers("a", "b"))
        assert told.score[0] == 2 and "raise judge_max_tokens" in told.error[1]
        told = model_judge(server, tmp_path, max_tokens=4000).judged(answers("a", "b"))
    assert told.score.tolist() == [2, 3] and len(server.bodies) == 3


def part(text, kind="text"):
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    "message",
    [
        {"content": verdict(3), "reasoning_content": verdict(1)},
        {"content": [part(verdict(3))]},
        {"content": [part(verdict(1), "thinking"), part(verdict(3)[:9]), part(verdict(3)[9:])]},
        {"content": [verdict(3)], "refusal": None, "tool_calls": []},
        {"content": f"{verdict(1)}</think>\n\n```JSON\n{verdict('3')}\n```"},
    ],
)
def test_a_message_as_servers_send_it_is_read(message):
    with Server(lambda body: {"message": message, "finish_reason": "stop"}) as server:
        assert model_judge(server).judged(answers("x")).score.tolist() == [3]


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": verdict(3)},
        {"content": []},
        {"content": [part(verdict(3), "thinking"), {"type": "text"}, None, 3]},
        {"content": {"score": 3}},
        {"refusal": "no"},
        {"content": ""},
    ],
)
def test_a_message_that_says_nothing_has_no_score(message):
    with Server(lambda body: {"message": message}) as server:
        told = model_judge(server).judged(answers("x"))
    assert told.score.isna().all() and told.error[0] == "no JSON object with score"


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
        choose_judge("openai", model="m", url=url)
    assert KEY not in str(error.value)


def test_an_address_is_checked_with_any_judge_before_a_notebook_holds_it():
    known = params.known_parameters(params.read_notebooks(Path(__file__).parents[2]))
    for url in NO_ADDRESS:
        with pytest.raises(DermError, match="here: judge_url") as error:
            params.check({"judge": "rubric", "judge_url": url}, known, "here")
        assert KEY not in str(error.value)
        with pytest.raises(DermError, match="judge_url"):
            ChatServer("m", url)
    for url in ("http://127.0.0.1:8000/v1", "https://judge.example/v1", "http://[::1]:8000/v1"):
        assert params.check({"judge_url": url}, known, "here") == {"judge_url": url}


def test_a_judge_that_cannot_work_is_refused():
    with pytest.raises(DermError, match="rubric, openai"):
        choose_judge("human")
    with pytest.raises(DermError, match="judge_model"):
        choose_judge("openai", model=" ", url="http://127.0.0.1/v1")
    with pytest.raises(DermError, match="aspects"):
        choose_judge("openai", model="m", url="http://127.0.0.1/v1", prompt="paper2")
