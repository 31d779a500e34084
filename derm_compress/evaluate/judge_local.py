"""A judge out of a chat model's folder or hub id, in a process of its own: its memory comes and goes with it.

The process first says what the model needs and what is free, and loads nothing that will not fit. This module imports
torch in that process alone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.evaluate.judge_fit import fit, readable, source
from derm_compress.evaluate.judge_forms import Form, Reply, storable
from derm_compress.files import folder_fingerprint, public

PROMPT = 2048  # tokens of a prompt that the cache is planned for; a longer prompt is judged if the model takes it
_HELD: dict = {}  # of the judge's process: tokenizer and model


@dataclass(frozen=True)
class Local:
    """A chat model by folder, or by hub id (id@revision to pin it), greedy, `batch` answers at once."""

    model: str
    device: str = "cpu"
    batch: int = 8

    def identity(self) -> dict:
        """What a reply depends on beside its messages: a folder counts by its files."""
        found = folder_fingerprint(Path(self.model)) if Path(self.model).is_dir() else self.model
        return {"kind": "transformers", "model": found, "device": self.device, "batch": self.batch}

    def replies(self, todo: dict[str, list], form: Form) -> Iterator[tuple[str, Reply]]:
        """(key, Reply) of every task, shortest first. Raises DermError if the model cannot be loaded."""
        order = sorted(todo, key=lambda key: sum(len(message["content"]) for message in todo[key]))
        _let_go()
        with self._process() as pool:
            self._check(pool, form)
            self._result(pool.submit(_load, self.model, self.device))
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                texts = self._result(
                    pool.submit(_answer, [todo[key] for key in part], form.max_tokens)
                )
                yield from zip(part, (Reply(*told) for told in texts), strict=True)

    def foresee(self, form: Form) -> None:
        """Says whether the model fits; raises DermError where it does not. This process touches no GPU."""
        with self._process() as pool:
            self._check(pool, form)

    def _process(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )

    def _check(self, pool: ProcessPoolExecutor, form: Form) -> None:
        found = self._result(
            pool.submit(fit, self.model, self.device, self.batch, PROMPT + form.max_tokens)
        )
        print(said := found.says(public(self.model)), flush=True)
        if found.needed > found.free:
            raise DermError(
                f"{said}. Take a smaller judge_model, or serve it elsewhere and set judge: openai"
            )

    def _result(self, future: Future):
        try:
            return future.result()
        except BrokenProcessPool as error:
            advice = "out of memory, most likely: take a smaller judge_model"
            raise DermError(
                f"judge {public(self.model)}: its process was ended ({advice})"
            ) from error


def _let_go() -> None:
    """Gives back what this process holds of the GPU without using it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _end_with_parent() -> None:
    """The judge's process ends when the one that asked for it was killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def half():
    """The half precision of this GPU: below capability 8.0 bf16 is emulated, whatever is_bf16_supported says."""
    import torch

    return torch.float16 if torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16


def _load(model: str, device: str) -> None:
    """Tokenizer and model into _HELD; safetensors only, no code of theirs, every weight accounted for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {"dtype": torch.float32} if device == "cpu" else {"dtype": half(), "device_map": "auto"}
    with readable(model):
        tokenizer = AutoTokenizer.from_pretrained(**source(model), padding_side="left")
        loaded, told = AutoModelForCausalLM.from_pretrained(
            **source(model), **how, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(told["missing_keys"]):
        raise DermError(
            f"judge {public(model)}: {len(missing)} weights are missing, first {missing[0]}"
        )
    if not tokenizer.chat_template:
        raise DermError(f"judge {public(model)} has no chat template: take a chat (instruct) model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    _HELD.update(tokenizer=tokenizer, model=loaded.eval())


def _answer(tasks: list[list[dict]], new_tokens: int) -> list[tuple[str, str]]:
    """(text, error) of each task's greedy reply; one that does not fit into the model's context is an error."""
    import torch

    from derm_compress.model import oom

    tokenizer, model = _HELD["tokenizer"], _HELD["model"]
    texts = [_prompt(tokenizer, task) for task in tasks]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(
        model.device
    )
    length, limit = (
        inputs["input_ids"].shape[1],
        getattr(model.config, "max_position_embeddings", None),
    )
    if limit and length + new_tokens > limit:
        if len(tasks) > 1:
            return [_answer([task], new_tokens)[0] for task in tasks]
        return [("", f"a prompt of {length} tokens and a reply do not fit into {limit}")]
    how = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
    }
    how |= {
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = None
    with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode():
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **how
        )
    if ids is None:
        size = oom.fewer(len(tasks), "judge")
        parts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        return [told for part in parts for told in _answer(part, new_tokens)]
    told = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    return [(storable(text), "") for text in told]


def _prompt(tokenizer, messages: list[dict]) -> str:
    """The chat as text by the model's own template; where that knows no system turn, its text opens the user's."""
    from jinja2 import TemplateError

    how = {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except TemplateError:
        text = "\n\n".join(message["content"] for message in messages)
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], **how)
