"""A model is loaded whole or not at all, whatever its folder lacks or holds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from derm_compress.errors import DermError
from derm_compress.model import anatomy, loading
from derm_compress.model.processors import check_picture_size


def test_the_fingerprint_tells_models_apart(pico):
    model, _ = pico
    same, _ = loading.load_base("pico")
    tiny, _ = loading.load_base("tiny")
    assert anatomy.fingerprint(model) == anatomy.fingerprint(same) != anatomy.fingerprint(tiny)
    with torch.no_grad():
        anatomy.blocks(model)[3].mlp.up_proj.weight.mul_(1.01)
    assert anatomy.fingerprint(model) != anatomy.fingerprint(same)


def test_shapes_without_weights_are_shown_on_pico(pico):
    shapes = loading.load_base("pico", anatomy.META)
    assert not anatomy.has_values(shapes[0])
    assert anatomy.has_values(loading.with_values(*shapes)[0])
    assert loading.with_values(*pico) == pico


@pytest.fixture
def folder(pico, tmp_path):
    """Pico as an ordinary model folder."""
    for part in pico:
        part.save_pretrained(tmp_path)
    return tmp_path


def set_blocks(folder, count):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = count
    (folder / "config.json").write_text(json.dumps(config))


def lose_a_weight(folder):
    state = load_file(folder / "model.safetensors")
    state.pop(next(name for name in state if "layers.5.mlp.up_proj" in name))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickle_the_weights(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose_a_weight, "1 weights are missing"),
        (lambda folder: set_blocks(folder, 9), "weights are missing"),  # they would be random
        (lambda folder: set_blocks(folder, 5), "weights have no place in its config"),
        (cut_the_file, "cannot be loaded"),
        (pickle_the_weights, "cannot be loaded"),
        (lambda folder: BertConfig().save_pretrained(folder), "this study needs a LLaVA model"),
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, spoil, words):
    assert loading.load_base(str(folder))
    spoil(folder)
    with pytest.raises(DermError, match=words):
        loading.load_base(str(folder))


def test_pictures_of_another_size_are_refused(pico, dataset):
    check_picture_size(pico[1], dataset.images)
    with pytest.raises(DermError, match="image_size: 72"):
        check_picture_size(pico[1], dataset.images[:, :36, :36])
