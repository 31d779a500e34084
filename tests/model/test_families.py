"""Every family of LLaVA takes the whole road, or is refused by name before a weight is read."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from asking import about, logits
from families import BLOCKS, FAMILIES, PLAIN, SIZE, change
from peft import PeftModel
from safetensors.torch import save_file
from small_llava import scales_of, search_one
from transformers import LlavaForConditionalGeneration

from derm_compress.data import dialogue, synthetic
from derm_compress.errors import DermError
from derm_compress.evaluate.answers import answer
from derm_compress.evaluate.export import write_folder
from derm_compress.method.assemble import materialize, merge_adapter
from derm_compress.method.finetune import train
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.quantization import checkpoint, quantize, search
from derm_compress.method.quantization.methods import METHODS, Form, forms
from derm_compress.method.quantization.packed import PackedLinear, use_kernels
from derm_compress.method.quantization.quantize import quantize_step, quantized_linears
from derm_compress.model import anatomy, devices, loading, prompts, removal, shapes
from derm_compress.model.generation import generate
from derm_compress.model.reading import Prompts
from derm_compress.model.recipe import Recipe, adapter_digest
from derm_compress.model.units import Unit

QUESTIONS = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
TRAINING = train.Training(rank=2, alpha=2, learning_rate=1e-2, steps=1, batch_size=2, seed=0)
FORMS = (  # whether the folder holds codes, and whether plain Transformers opens it
    (Form("awq", 4, clip=True), False, True),
    (Form("awq", 4, clip=True), True, False),
    (Form("rtn", 3), True, False),
    (Form("bitsandbytes", 4), True, True),
)
every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


@pytest.fixture(scope="module")
def pictures():
    return synthetic.make(n_train=8, n_test=2, n_heldout=2, size=SIZE, seed=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {
        family.name: families.write(family, root / family.name) for family in [PLAIN, *FAMILIES]
    }


@pytest.fixture
def loaded(family, folders):
    return loading.load_base(str(folders[family.name]))


@every
def test_training_answering_calibration_and_drafts_read_the_same_tokens(loaded, pictures):
    model, processor = loaded
    tokens = anatomy.image_tokens(model.config)
    read = Prompts.of(processor, pictures.images[0], QUESTIONS, "cpu")
    for kind, question in QUESTIONS.items():
        said = dialogue.reference("melanoma", {}, kind)
        ids, labels = prompts.encode(processor, [(question, said)], image_tokens=tokens)
        asked = about(processor, pictures.images, kind)["input_ids"][0].tolist()
        learnt = ids[labels != prompts.IGNORED].tolist()
        assert (ids == model.config.image_token_id).sum() == tokens
        assert ids[: len(asked) + len(learnt)].tolist() == asked + learnt
        assert read.prefix.tolist() + read.rest[kind] == asked and read.told(kind, said) == learnt
        assert learnt[-1] == prompts.ends(processor)[0]
        assert processor.tokenizer.decode(learnt[:-1]).strip() == said
    items = pictures.of("train")[:1]
    how = {"batch_size": 3, "device": "cpu", "answer_weight": 2.0}
    (batch,) = prompts.calibration_batches(processor, items, pictures.images, **how)
    for row, weights, kind in zip(
        batch["input_ids"], batch["token_weights"], QUESTIONS, strict=True
    ):
        told = dialogue.reference(items[0].disease, items[0].facts, kind)
        whole = read.prefix.tolist() + read.rest[kind] + read.told(kind, told)[:-1]
        assert row.tolist()[-len(whole) :] == whole
        assert row[weights == 2].tolist() == read.told(kind, told)[:-1]


@every
def test_later_turns_go_on_as_a_conversation_does(loaded):
    """What precedes a later question in training is what a user who goes on would send."""
    _, processor = loaded
    turns = [("Q one?", "A one."), ("Q two?", "A two.")]
    whole = prompts.render(processor, turns, picture=False)
    asked = prompts.render(processor, [turns[0], ("Q two?", None)], picture=False)
    assert whole.text.startswith(asked.text) and len(whole.answers) == 2
    assert whole.text[: whole.answers[1].start] == asked.text
    assert prompts.render(processor, turns[:1], picture=False).answers == whole.answers[:1]


@every
def test_answers_are_those_of_plain_transformers(loaded, folders, family, pictures):
    model, processor = loaded
    plain = LlavaForConditionalGeneration.from_pretrained(folders[family.name], dtype=torch.float32)
    plain.eval()
    inputs = about(processor, pictures.images, *QUESTIONS)
    how = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    told = plain.generate(**inputs, **how, eos_token_id=prompts.ends(processor))
    told = processor.tokenizer.batch_decode(
        told[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    said, _, _ = generate(model, processor, inputs, max_new_tokens=5)
    assert said == [text.strip() for text in told]
    assert shapes.architecture(model.config).parameters() == sum(
        weight.numel() for weight in plain.parameters()
    )


@every
def test_answers_without_a_unit_are_those_of_the_model_without_it(loaded, pictures):
    model, processor = loaded
    items, units = pictures.of("test"), [Unit(1), Unit(0, "attention"), Unit(2, "mlp")]
    c = Calibration(model, processor, items, pictures.images, batch_size=6, max_new_tokens=4)
    found = {row.key: text for row, text in c.answers(units)}
    how = {"variant": "v", "batch_size": 2, "max_new_tokens": 4}
    for unit in [None, *units]:
        with removal.without(model, [unit] if unit else []):
            told = answer(model, processor, items, pictures.images, **how)
        for row in told.itertuples():
            assert found[unit, row.item, row.question] == row.answer


@every
def test_a_training_step_moves_adapters_on_every_linear(loaded, pictures, tmp_path):
    model, processor = loaded
    where = {"checkpoint": tmp_path / "c", "what": "a"}
    data = pictures.of("train"), pictures.images
    tuned, curve, _ = train.train(model, processor, *data, TRAINING, **where)
    linears = sum(len(anatomy.linears(block)) for block in anatomy.blocks(model))
    moved = [
        p for n, p in tuned.named_parameters() if p.requires_grad and "lora_B" in n and p.any()
    ]
    assert len(moved) == linears and np.isfinite(curve.loss).all()
    assert quantized_linears(tuned.get_base_model())["decoder"] == linears


@every
def test_folded_scales_change_no_output(loaded, pictures):
    model, processor = loaded
    inputs = about(processor, pictures.images, "name")
    scales, rng = {}, torch.Generator().manual_seed(0)
    for key, (_, linears) in quantize.scale_groups(model).items():
        scales[key] = 0.5 + torch.rand(linears[0].in_features, generator=rng)
    with torch.inference_mode():
        before = model(**inputs).logits
        quantize.fold_scales(model, scales)
        assert torch.allclose(model(**inputs).logits, before, atol=1e-4)
    grouped = model.config.text_config.num_key_value_heads < 4
    assert len(scales) == BLOCKS * (3 if grouped else 4)


@every
def test_a_pruned_and_quantized_model_is_exported_and_read_again(
    loaded, family, folders, pictures, store, tmp_path
):
    model, processor = loaded
    whole = Recipe(str(folders[family.name]), anatomy.fingerprint(model), BLOCKS).pruned([0, 2])
    inputs = about(processor, pictures.images, *QUESTIONS)
    with removal.without(model, [1]):
        how = {"batch_size": 6, "device": "cpu"}
        batches = prompts.calibration_batches(
            processor, pictures.of("train")[:2], pictures.images, **how
        )
        tensors, rows = search_one(model, batches, Form("awq", 4, clip=True))
    assert {row["group"] for row in rows} >= {"qkv", "gate_up", "down"}
    save_file(tensors, tmp_path / "scales.safetensors")
    for form, packed, plain in FORMS:
        ref = {"ref": store.ref("scales.safetensors")} if form.searched else {}
        recipe = whole.then("quantize", **form.step, **ref)
        made, _ = materialize(recipe, store, quantize=partial(quantize_step, packed=packed))
        folder = tmp_path / f"{form.name}-{packed}"
        write_folder(folder, made, processor, recipe, packed=packed)
        again, read = checkpoint.load(folder)
        for one in (made, again):
            use_kernels(one, False)  # which compute in bfloat16
        assert torch.equal(logits(again, inputs), logits(made, inputs))
        assert prompts.prompt(read, "name") == prompts.prompt(processor, "name")
        assert anatomy.tied(again) == anatomy.tied(model)
        if plain:
            how = {"output_loading_info": True}
            again, told = LlavaForConditionalGeneration.from_pretrained(folder, **how)
            assert not told["missing_keys"] and not told["unexpected_keys"]
            # bitsandbytes may compute in bfloat16 on a CPU
            close = {"atol": 0.1} if packed else {"atol": 0, "rtol": 0}
            assert torch.allclose(logits(again.eval(), inputs), logits(made, inputs), **close)


@pytest.fixture
def tied(folders):
    """The one with grouped heads under a tied head, as the small model: its folder and parts."""
    (family,) = (family for family in FAMILIES if "tied" in family.notes)
    assert "grouped" in family.notes
    return folders[family.name], *loading.load_base(str(folders[family.name]))


def test_every_method_takes_grouped_heads_under_a_tied_head(tied, pictures):
    _, model, processor = tied
    inputs = about(processor, pictures.images, "name")
    whole, tried = logits(model, inputs), set()
    more = [Form("awq", 3, duo=True, clip=True), Form("bitsandbytes", double=True)]
    more += [Form("gptq", 3, clip=True, actorder=True), Form("rtn", 4, block_bits={0: 2})]
    for form in [*forms([*METHODS], [4, 2], 64), *more]:
        if form.method == "autoawq":  # writes what awq4 does
            continue
        scales = scales_of(model, [inputs], form)
        made = quantize.quantize(copy.deepcopy(model), form, scales=scales, packed=True)
        use_kernels(made, False)
        assert anatomy.tied(made) and quantized_linears(made)["decoder"] == 7 * BLOCKS
        said = logits(made, inputs)
        assert 0 < (said - whole).norm() < whole.norm(), form.name
        if form.method != "llm_int8":  # which rounds its inputs, too
            rounded = quantize.quantize(copy.deepcopy(model), form, scales=scales)
            assert torch.allclose(logits(rounded, inputs), said, atol=1e-4), form.name
            for one, other in zip(made.modules(), rounded.modules(), strict=False):
                if isinstance(one, PackedLinear):
                    assert torch.equal(one.dequantized(), other.weight)
        tried.add(form.method)
    assert tried == METHODS.keys() - {"autoawq"}


def test_an_adapter_is_merged_under_a_tied_head(tied, pictures, tmp_path):
    folder, model, processor = tied
    data = pictures.of("train"), pictures.images
    where = {"checkpoint": tmp_path / "c", "what": "a"}
    tuned, _, _ = train.train(model, processor, *data, TRAINING, **where)
    tuned.save_pretrained(tmp_path / "a")
    step = {"kept": list(range(BLOCKS)), "sha256": adapter_digest(tmp_path / "a")}
    merged, processor = loading.load_base(str(folder))
    inputs = about(processor, pictures.images, "name")
    before = logits(merged, inputs)
    merge_adapter(merged, tmp_path / "a", step, kept=tuple(range(BLOCKS)))
    unmerged = PeftModel.from_pretrained(loading.load_base(str(folder))[0], tmp_path / "a")
    assert anatomy.tied(merged) and not torch.allclose(logits(merged, inputs), before, atol=1e-2)
    assert torch.allclose(logits(merged, inputs), logits(unmerged, inputs), atol=1e-3)


def lose_the_template(folder):
    (folder / "chat_template.jinja").unlink()


def no_picture(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] | length }}")


def split_the_end(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("{{ ' ' }}", "[stop]"))


def join_the_answer(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("ASSISTANT:", "ASSISTANT: "))


def config(**told):
    return lambda folder: change(folder, "config.json", **told)


def inner(part, **told):
    def spoil(folder):
        found = json.loads((folder / "config.json").read_text())[part]
        change(folder, "config.json", **{part: found | told})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (inner("text_config", model_type="gemma"), "its decoder is gemma; known: llama, mistral,"),
        (inner("vision_config", model_type="dinov2"), "its tower is dinov2; known: clip"),
        (inner("text_config", model_type="mistral", sliding_window=64), "see 64 tokens back"),
        (inner("vision_config", patch_size=0), "pictures of 56 px in patches of 0"),
        (inner("vision_config", image_size=42), "makes pictures of 56 x 56 px, its tower reads 42"),
        (inner("text_config", vocab_size=3), "token 4 of its tokenizer has no row"),
        (config(vision_feature_select_strategy="middle"), "no readable config.json"),
        (config(vision_feature_select_strategy="full"), "16 tokens a picture, the model gives 17"),
        (config(image_token_index=5), "<image> is token 4 to its tokenizer and 5 to its config"),
        (config(text_config=5), "no readable config.json"),
        (lose_the_template, "no chat template: put a chat_template.jinja"),
        (no_picture, "its chat template .* leaves out what is asked"),
        (split_the_end, r"ends an answer with '\[stop\]</s>', which its tokenizer splits"),
        (join_the_answer, "a token joins a prompt's end with the answer"),
        (
            lambda folder: (folder / "processor_config.json").unlink(),
            "its processor cannot be used",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            "its processor cannot be used",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_a_weight_is_read(tmp_path, spoil, words):
    folder = families.write(PLAIN, tmp_path / "odd")
    (folder / "model.safetensors").write_bytes(b"not read")
    loading.check_model(str(folder))
    spoil(folder)
    with pytest.raises(DermError, match=f"model .*odd: .*{words}"):
        loading.load_base(str(folder))


@pytest.mark.parametrize(
    "name", ["./models/llava", "./mistyped", "a/b/c", "~/nowhere", "no such model"]
)
def test_a_mistyped_path_is_no_hub_id(name):
    with pytest.raises(
        DermError, match="there is no such folder; a model is tiny, small, pico, a folder"
    ):
        loading.load_base(name)


def test_a_penalty_of_the_folders_own_does_not_reach_greedy_answers(folders, pictures, tmp_path):
    folder = shutil.copytree(folders[PLAIN.name], tmp_path / "penal")
    change(folder, "generation_config.json", repetition_penalty=9.0, top_p=0.1)
    model, processor = loading.load_base(str(folder))
    inputs = about(processor, pictures.images, "name")
    told = generate(model, processor, inputs, max_new_tokens=8)
    assert told == generate(*loading.load_base(str(folders[PLAIN.name])), inputs, max_new_tokens=8)
    model.save_pretrained(tmp_path / "again")  # Transformers refuses settings that go unused


def test_every_weight_of_a_known_decoders_block_is_in_a_linear_that_is_known(folders):
    tried = {family.model_type for family in FAMILIES}
    assert tried == set(anatomy.DECODERS)
    assert {family.tower["model_type"] for family in FAMILIES} == set(anatomy.TOWERS)
    for folder in folders.values():
        model, _ = loading.load_base(str(folder), anatomy.META)
        for block in anatomy.blocks(model):
            matrices = {n for n, weight in block.named_parameters() if weight.ndim > 1}
            assert matrices == {f"{name}.weight" for name in anatomy.linears(block)}


def test_the_readme_says_what_was_tried():
    assert families.table() in (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_a_tied_head_stays_with_its_embedding(tied, tmp_path):
    """Over two GPUs, and in a folder of a model that lacks a sublayer."""
    folder, model, processor = tied
    places = devices.placement(model, 2)
    assert places["lm_head"] == places["model.language_model.embed_tokens"] == 0
    recipe = Recipe(str(folder), anatomy.fingerprint(model), BLOCKS)
    recipe = recipe.pruned(range(BLOCKS), ["1.mlp"])
    removal.apply(model, range(BLOCKS), ["1.mlp"])
    write_folder(tmp_path / "partial", model, processor, recipe)
    again, _ = loading.load_base(str(tmp_path / "partial"))
    assert anatomy.tied(again) and anatomy.fingerprint(again) == anatomy.fingerprint(model)


def test_autoawq_is_told_that_it_does_not_know_fused_projections(folders):
    (family,) = (family for family in FAMILIES if family.model_type == "phi3")
    model, _ = loading.load_base(str(folders[family.name]))
    with pytest.raises(DermError, match="autoawq knows separate projections alone"):
        search.search_forms(model, [], {"autoawq4": Form("autoawq", 4)})
