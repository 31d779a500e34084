"""The published checkpoint's layout through the code that loads it, and its traps."""

import json

import numpy as np
import pytest
import torch
from published_llava import BLOCKS, PATCH, SIZE, write, write_processor
from transformers import AutoProcessor

from derm_compress.data import synthetic
from derm_compress.errors import DermError
from derm_compress.evaluate.answers import answer
from derm_compress.method.finetune import train
from derm_compress.model import anatomy, devices, loading, prompts, removal

IMAGE_TOKENS = (SIZE // PATCH) ** 2
TRAINING = train.Training(rank=4, alpha=8, learning_rate=1e-2, steps=2, batch_size=3, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "mini-llava"
    write(path)
    return path


@pytest.fixture
def published(folder):
    return loading.load_base(str(folder))


@pytest.fixture(scope="module")
def small():
    """The synthetic pictures at the small model's size."""
    return synthetic.make(n_train=12, n_test=4, n_heldout=4, size=SIZE, seed=5)


def training_batch(published, small, n):
    rng = np.random.default_rng(0)
    return train.training_batch(*published, small.of("train")[:n], small.images, rng)


def test_every_weight_arrives_under_its_new_name(tmp_path):
    state = write(tmp_path)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.partition(".")[0] for name in names} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
    }
    assert "language_model.lm_head.weight" in names and len(set(names.values())) == 2
    model, _ = loading.load_base(str(tmp_path))
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in state.items())
    assert model.config.text_config._attn_implementation == "sdpa"


def test_names_that_fit_nothing_are_refused_but_what_follows_from_the_config_is_not(tmp_path):
    layers = "language_model.model.layers"
    buffers = [f"{layers}.{b}.self_attn.rotary_emb.inv_freq" for b in range(BLOCKS)]
    buffers += ["vision_tower.vision_model.embeddings.position_ids"]
    write(tmp_path / "old", extra={name: torch.arange(4) for name in buffers})
    assert loading.load_base(str(tmp_path / "old"))
    write(tmp_path / "odd", extra={f"{layers}.9.mlp.up_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(DermError, match="odd: 1 weights have no place in its config"):
        loading.load_base(str(tmp_path / "odd"))


def test_the_true_size_expands_to_576_tokens(tmp_path):
    write_processor(tmp_path, size=336)
    processor = AutoProcessor.from_pretrained(tmp_path)
    texts = [prompts.prompt(processor, kind) for kind in ("name", "features")]
    inputs = prompts.prepare(processor, texts, np.zeros((2, 336, 336, 3), np.uint8), "cpu")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image).sum(1).tolist() == [576, 576]
    assert inputs["pixel_values"].shape[-1] == 336


def test_padding_is_on_the_right_in_training_and_on_the_left_in_generation(published, small):
    batch = training_batch(published, small, 4)
    mask, pad = batch["attention_mask"], published[1].tokenizer.pad_token_id
    assert (mask[:, 0] == 1).all() and (mask.diff(dim=1) <= 0).all() and (mask == 0).any()
    assert (batch["labels"][mask == 0] == prompts.IGNORED).all()
    assert (batch["input_ids"][mask == 0] == pad).all()
    texts = [prompts.prompt(published[1], kind) for kind in ("name", "features")]
    assert texts[0] == "USER: <image>\nWhat is the name of the disease? ASSISTANT:"
    mask = prompts.prepare(published[1], texts, small.images[:2], "cpu")["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all() and (mask == 0).any()


def test_gradient_checkpointing_changes_no_gradient(published, small):
    tuned = train.attach(published[0], TRAINING).train()
    batch = training_batch(published, small, 2)

    def gradients():
        tuned.zero_grad()
        tuned(**batch, use_cache=False).loss.backward()
        return [p.grad.clone() for p in tuned.parameters() if p.requires_grad]

    plain = gradients()
    train.save_memory(published[0])
    again = gradients()
    assert anatomy.decoder(published[0]).gradient_checkpointing
    assert any(gradient.abs().sum() > 0 for gradient in plain)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_blocks_on_several_devices_answer_as_on_one(published, small, tmp_path, monkeypatch):
    """The second GPU's part on disk, run on the CPU: the same hooks, with and without a block."""
    model, processor = published
    how = {"variant": "v", "batch_size": 4, "max_new_tokens": 6}

    def answers():
        whole = answer(model, processor, small.of("test"), small.images, **how)
        with removal.without(model, [1]):
            return whole, answer(model, processor, small.of("test"), small.images, **how)

    before, places = answers(), devices.placement(model, 2)
    layers = [places[f"model.language_model.layers.{i}"] for i in range(BLOCKS)]
    assert layers == [0, 0, 1] and places["lm_head"] == 1
    assert not before[0].answer.equals(before[1].answer)
    stand_ins = {name: ("cpu", "disk")[device] for name, device in places.items()}
    monkeypatch.setattr(devices, "placement", lambda *_: stand_ins)
    devices.spread(model, 2, offload_dir=tmp_path, main_device="cpu")
    assert model.hf_device_map == stand_ins and model.lm_head.weight.is_meta
    assert all(one.equals(other) for one, other in zip(before, answers(), strict=True))


def test_a_gpu_that_emulates_bf16_gets_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # what a T4 says
    assert devices.half("cuda") == torch.float16 and devices.half("cpu") == torch.float32
