"""The published checkpoint's layout through the code that loads it, and the traps that come with it."""

import json

import numpy as np
import pytest
import torch
from published_llava import BLOCKS, PATCH, SIZE, old_name, write, write_processor
from transformers import AutoProcessor

from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.evaluate.answers import answer
from derm_compress.method.assemble import materialize
from derm_compress.method.finetune import train
from derm_compress.method.finetune.merge import merge_adapter
from derm_compress.method.quantization import quantize
from derm_compress.model import anatomy, devices, loading, prompts, removal
from derm_compress.model.recipe import Recipe, adapter_digest

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
    from derm_compress.data import synthetic

    return synthetic.make(n_train=12, n_test=4, n_heldout=4, size=SIZE, seed=5)


def test_every_weight_arrives_under_its_new_name(tmp_path):
    state = write(tmp_path / "m")
    names = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    for start in (
        "language_model.model.layers.0.",
        "language_model.lm_head.",
        "vision_tower.vision_model.encoder.",
    ):
        assert any(name.startswith(start) for name in names)
    assert "multi_modal_projector.linear_1.weight" in names and len(set(names.values())) == 2
    model, _ = loading.load_base(str(tmp_path / "m"))
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in state.items())


def test_a_renamed_checkpoint_is_refused_rather_than_filled_with_random_weights(tmp_path):
    """What a checkpoint of another version of Transformers looks like: its tower would be random."""
    write(
        tmp_path / "m",
        rename=lambda name: name.replace("vision_tower.vision_model.", "vision_tower.backbone."),
    )
    with pytest.raises(
        DermError,
        match=r"m: \d+ weights are missing or of another shape, first model\.vision_tower",
    ):
        loading.load_base(str(tmp_path / "m"))


def test_names_that_fit_nothing_are_refused_but_what_follows_from_the_config_is_not(tmp_path):
    buffers = ["vision_tower.vision_model.embeddings.position_ids"]
    buffers += [
        f"language_model.model.layers.{b}.self_attn.rotary_emb.inv_freq" for b in range(BLOCKS)
    ]
    write(tmp_path / "old", extra={name: torch.arange(4) for name in buffers})
    assert loading.load_base(str(tmp_path / "old"))
    write(
        tmp_path / "odd",
        extra={"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)},
    )
    with pytest.raises(DermError, match="odd: 1 weights have no place in its config"):
        loading.load_base(str(tmp_path / "odd"))


def test_the_true_size_expands_to_576_tokens(tmp_path):
    write_processor(tmp_path, size=336)
    processor = AutoProcessor.from_pretrained(tmp_path)
    pixels = np.zeros((2, 336, 336, 3), np.uint8)
    texts = [prompts.prompt(processor, kind) for kind in ("name", "features")]
    inputs = prompts.prepare(processor, texts, pixels, "cpu")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image).sum(1).tolist() == [576, 576] and inputs[
        "pixel_values"
    ].shape[-1] == 336


def test_a_processor_that_expands_to_one_token_too_few_is_refused(tmp_path):
    write(tmp_path / "m")
    write_processor(tmp_path / "m", additional=0)
    with pytest.raises(
        DermError, match="15 tokens a picture, the model gives 16: .*num_additional_image_tokens"
    ):
        loading.load_base(str(tmp_path / "m"))


def test_the_prompt_is_the_published_one_and_ends_nothing(published):
    _, processor = published
    assert (
        prompts.prompt(processor, "name")
        == "USER: <image>\nWhat is the name of the disease? ASSISTANT:"
    )
    told = [{"role": "assistant", "content": [{"type": "text", "text": "Rosacea."}]}]
    assert "</s>" not in processor.apply_chat_template(
        told
    )  # so SFT by the template would never teach an end
    assert processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id


def test_labels_are_answers_and_their_ends(published):
    _, processor = published
    tokenizer = processor.tokenizer
    turns = [
        (dialogue.question("name"), "This is rosacea."),
        (dialogue.question("treatment"), "Sun protection."),
    ]
    ids, labels = prompts.encode(tokenizer, turns, IMAGE_TOKENS)
    kept = labels != prompts.IGNORED
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (
        ids[0] == tokenizer.bos_token_id
        and (ids == image).sum() == IMAGE_TOKENS
        and not kept[ids == image].any()
    )
    assert (labels == tokenizer.eos_token_id).sum() == 2 and ids[-1] == labels[
        -1
    ] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[kept]).replace(" ", "") == "Thisisrosacea.</s>Sunprotection.</s>"
    assert not kept[: int(kept.int().argmax())].any()


def test_training_reads_what_the_test_asks(published, small):
    """The same ids up to the answer, though one road is the template and the processor, the other this package's."""
    model, processor = published
    question = dialogue.question("features")
    ids, labels = prompts.encode(
        processor.tokenizer, [(question, "Papules.")], prompts.image_tokens(model)
    )
    asked = prompts.prepare(
        processor, [prompts.prompt(processor, "features")], small.images[:1], "cpu"
    )["input_ids"]
    first = int((labels != prompts.IGNORED).int().argmax())
    assert asked[0].tolist() == ids[:first].tolist()


def test_criteria_continue_prompts_with_the_same_ids(published, small):
    """reading.Prompts takes a prompt apart: beginning, rest and answer are what the whole text gives."""
    from derm_compress.model.reading import Prompts

    _, processor = published
    questions = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
    made = Prompts.of(processor, small.images[0], questions, "cpu")
    for kind, question in questions.items():
        ids, labels = prompts.encode(
            processor.tokenizer, [(question, "Sun protection.")], IMAGE_TOKENS
        )
        assert [
            *made.prefix.tolist(),
            *made.rest[kind],
            *made.told(kind, "Sun protection."),
        ] == ids.tolist()
        assert made.told(kind, "Sun protection.") == ids[labels != prompts.IGNORED].tolist()


def test_padding_is_on_the_right_in_training_and_on_the_left_in_generation(published, small):
    model, processor = published
    batch = train.training_batch(
        model, processor, small.of("train")[:4], small.images, np.random.default_rng(0)
    )
    mask, pad = batch["attention_mask"], processor.tokenizer.pad_token_id
    assert (mask[:, 0] == 1).all() and (mask.diff(dim=1) <= 0).all() and (mask == 0).any()
    assert (batch["labels"][mask == 0] == prompts.IGNORED).all() and (
        batch["input_ids"][mask == 0] == pad
    ).all()
    texts = [prompts.prompt(processor, kind) for kind in ("name", "features")]
    mask = prompts.prepare(processor, texts, small.images[:2], "cpu")["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all() and (mask == 0).any()


def test_adapters_and_4_bits_are_in_the_decoder_alone(published):
    model, _ = published
    tuned = train.attach(model, TRAINING)
    learned = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(learned) == BLOCKS * 7 * 2 and all(
        ".language_model.layers." in name for name in learned
    )
    counts = quantize.quantized_linears(tuned.get_base_model())
    assert counts == {"vision_tower": 0, "projector": 0, "decoder": BLOCKS * 7, "head": 0}


@pytest.fixture(scope="module")
def adapter(folder, small, tmp_path_factory):
    model, processor = loading.load_base(str(folder))
    path = tmp_path_factory.mktemp("adapter") / "a"
    where = {"checkpoint": path.parent / "c", "what": "a"}
    tuned, *_ = train.train(model, processor, small.of("train"), small.images, TRAINING, **where)
    tuned.save_pretrained(path)
    return path


def test_a_merged_adapter_gives_the_logits_of_the_unmerged(folder, adapter, small):
    from peft import PeftModel

    merged, processor = loading.load_base(str(folder))
    step = {"kept": list(range(BLOCKS)), "sha256": adapter_digest(adapter)}
    batch = train.training_batch(
        merged, processor, small.of("train")[:3], small.images, np.random.default_rng(0)
    )
    with torch.inference_mode():
        plain = merged(**batch).logits
        unmerged = PeftModel.from_pretrained(loading.load_base(str(folder))[0], adapter)(
            **batch
        ).logits
        merge_adapter(merged, adapter, step, kept=tuple(range(BLOCKS)))
        assert torch.allclose(merged(**batch).logits, unmerged, atol=1e-4) and not torch.allclose(
            plain, unmerged
        )


def test_the_whole_road_a_recipe_takes(folder, adapter, small, store):
    """Base, adapter, pruning, rounding: what stages 02 to 07 do with the published model."""
    model, processor = loading.load_base(str(folder))
    recipe = Recipe(str(folder), anatomy.fingerprint(model), BLOCKS)
    store = type(store)(adapter.parent)
    made = (
        recipe.with_adapter("a", adapter)
        .pruned([0, 2])
        .then("quantize", method="rtn", bits=4, group_size=64)
    )
    model, processor = materialize(made, store)
    how = {"variant": "v", "batch_size": 4, "max_new_tokens": 3}
    told = answer(model, processor, small.of("test"), small.images, **how)
    assert len(told) == 3 * len(small.of("test")) and len(anatomy.blocks(model)) == 2


def test_gradient_checkpointing_changes_no_gradient(published, small):
    model, processor = published
    tuned = train.attach(model, TRAINING).train()
    batch = train.training_batch(
        model, processor, small.of("train")[:2], small.images, np.random.default_rng(0)
    )

    def gradients():
        tuned.zero_grad()
        tuned(**batch, use_cache=False).loss.backward()
        return [p.grad.clone() for p in tuned.parameters() if p.requires_grad]

    plain = gradients()
    train.save_memory(model)
    again = gradients()
    assert anatomy.decoder(model).gradient_checkpointing and any(g.abs().sum() > 0 for g in plain)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_blocks_on_several_devices_answer_as_on_one(published, small, tmp_path, monkeypatch):
    """The second GPU's part on disk, run on the CPU: the same hooks, with and without a block."""
    model, processor = published
    ask = {
        "items": small.of("test"),
        "images": small.images,
        "variant": "v",
        "batch_size": 4,
        "max_new_tokens": 6,
    }

    def answers():
        whole = answer(model, processor, **ask)
        with removal.without(model, [1]):
            return whole, answer(model, processor, **ask)

    before, places = answers(), devices.placement(model, 2)
    assert {places[f"model.language_model.layers.{i}"] for i in (0, 1)} == {0} and places[
        "lm_head"
    ] == 1
    assert not before[0].answer.equals(before[1].answer)
    stand_ins = {name: ("cpu", "disk")[device] for name, device in places.items()}
    monkeypatch.setattr(devices, "placement", lambda *_: stand_ins)
    devices.spread(model, 2, offload_dir=tmp_path, main_device="cpu")
    assert model.hf_device_map == stand_ins and model.lm_head.weight.is_meta
    assert all(one.equals(other) for one, other in zip(before, answers(), strict=True))


def test_a_gpu_that_emulates_bf16_gets_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # what a T4 says
    assert devices.half("cuda") == torch.float16 and devices.half("cpu") == torch.float32


def test_attention_is_fused(published):
    assert published[0].config.text_config._attn_implementation == "sdpa"


def test_old_names_are_the_published_ones():
    assert old_name("lm_head.weight") == "language_model.lm_head.weight"
    assert (
        old_name("model.vision_tower.post_layernorm.bias")
        == "vision_tower.vision_model.post_layernorm.bias"
    )
