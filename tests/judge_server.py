"""A real HTTP server on this machine with the OpenAI interface: a pico model, faults and habits."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.evaluate.judges.client import SIZE
from derm_compress.evaluate.judges.judge import ModelJudge
from derm_compress.evaluate.judges.prompts import judge_prompt
from derm_compress.evaluate.judges.server import ChatServer

KEY = "sk-secret-123"


def answers(*texts, reference="This is psoriasis.") -> pd.DataFrame:
    """One variant's answers to the question for the name, each about a picture of its own."""
    same = {"variant": "original", "split": "test", "question": "name", "stopped": True}
    same |= {"prompt": dialogue.question("name"), "reference": reference}
    return pd.DataFrame([same | {"item": f"i{n}", "answer": text} for n, text in enumerate(texts)])


def model_judge(server, folder=None, prompt="paper", **how) -> ModelJudge:
    """The judge behind a Server, impatient."""
    served = ChatServer("pico", server.url, **{"timeout": 0.4, "retries": 2} | how)
    return ModelJudge(served, judge_prompt(prompt), folder)


def completion(said, model="pico") -> str:
    """A response's body; said: a message's content, or a choice with more than that."""
    choice = said if isinstance(said, dict) else {"message": {"content": said}}
    choice["message"].setdefault("role", "assistant")
    return json.dumps({"model": model, "choices": [choice]})


def verdict(score, **more) -> str:
    return json.dumps({"reason": "as told", "score": score} | more)


FAULTS = {  # fault: (status, headers, body)
    "busy": (429, {"Retry-After": "1"}, "{}"),
    "closed": (429, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, "{}"),
    "moved": (302, {"Location": "http://127.0.0.1:9/v1"}, ""),
    "broken": (500, {}, "<html>oops</html>"),
    "garbage": (200, {}, "\x00<html>not json"),
    "endless": (200, {}, completion("x" * SIZE)),
    "packed": (200, {"Content-Encoding": "gzip"}, completion(verdict(4))),
    "long": (200, {}, "garbage " + "x" * 1986 + KEY),  # the key lies where replies are cut
    "no completion": (200, {}, '{"choices": []}'),
    "no text": (200, {}, completion(None)),
    "refused": (401, {}, f'{{"error": "Incorrect API key provided: {KEY}"}}'),
    "bad request": (400, {}, f'{{"error": "not today, {KEY}"}}'),
    "broken in parts": (400, {}, '{"error": {"message": "temperature", "param": "messages"}}'),
}


def openai_refusal(field):
    told = {"message": f"Unsupported parameter: '{field}' is not supported", "param": field}
    return 400, {"error": told | {"type": "invalid_request_error"}}


def vllm_refusal(field):
    return 400, {"object": "error", "message": f"the {field} is not supported", "param": None}


def pydantic_refusal(field):
    return 422, {"detail": [{"loc": ["body", field], "msg": "Extra inputs are not permitted"}]}


def fields_of(*known, refusal=openai_refusal, answer=None):
    """A server that takes these fields alone beside model and messages, and refuses by name."""

    def answering(body):
        for field in body:
            if field not in {"model", "messages", *known}:
                return refusal(field)
        return answer(body) if answer else verdict(3)

    return answering


def answer_in(body) -> str:
    """What the judge is asked about, as it stands in a request."""
    asked = body["messages"][1]["content"].split("Answer of the model: ")[1]
    return asked.split("Reply with")[0]


class Server:
    """`answer(body)` gives what `completion` takes, or (status, body) of a refusal.

    `faults` go first, one a request.
    """

    def __init__(self, answer=lambda body: verdict(3), faults=(), seconds=0.0):
        self.answer, self.faults, self.seconds = answer, list(faults), seconds
        self.bodies, self.headers, self._lock = [], [], threading.Lock()
        self.at_once = self._now = 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def _enter(self, headers, body):
        with self._lock:
            self.bodies.append(json.loads(body))
            self.headers.append(dict(headers))
            self._now += 1
            self.at_once = max(self.at_once, self._now)
            return self.faults.pop(0) if self.faults else None

    def _leave(self):
        with self._lock:
            self._now -= 1

    def _handler(server):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fault = server._enter(self.headers, body)
                time.sleep(server.seconds)
                content = server.answer(json.loads(body)) if fault is None else None
                server._leave()  # before the reply is out: its reader may ask again at once
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.speak(fault, content)

            def speak(self, fault, content):
                if fault == "slow":
                    time.sleep(1.0)
                elif fault == "trickle":
                    self.start(200, {"Content-Length": "1000"})
                    for _ in range(20):
                        self.wfile.write(b" ")
                        time.sleep(0.1)
                    return
                elif fault == "cut":
                    self.start(200, {"Content-Length": "1000"})
                    self.wfile.write(b'{"choices"')
                    self.wfile.flush()
                    self.connection.close()
                    return
                if fault is not None:
                    status, headers, text = FAULTS[fault]
                elif isinstance(content, tuple):
                    (status, told), headers = content, {}
                    text = json.dumps(told)
                else:
                    status, headers, text = 200, {}, completion(content)
                text = text.encode()
                self.start(status, {"Content-Length": str(len(text))} | headers)
                self.wfile.write(text)

            def start(self, status, headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

        return Handler


def pico_judge(model, tokenizer):
    """An `answer` that gives the likeliest of the digits 1 to 4, by a real model's forward pass."""
    import torch

    digits, lock = [tokenizer.convert_tokens_to_ids(str(n)) for n in range(1, 5)], threading.Lock()

    def answer(body):
        text = "\n".join(message["content"] for message in body["messages"])
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, -256:]
        with lock, torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -1]
        return verdict(int(logits[digits].argmax()) + 1)

    return answer
