import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.evaluate import answers
from derm_compress.method import activation_analysis, activations
from derm_compress.method.finetune import train
from derm_compress.method.importance import measure
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.embedder import Embedder
from derm_compress.method.importance.plans import whole_answers
from derm_compress.method.importance.rankings import Ranking
from derm_compress.method.quantization import per_variant, search
from derm_compress.method.quantization import wanted as wanted_frames
from derm_compress.model import loading, oom
from derm_compress.model import variants as variants_of
from derm_compress.model.generation import generate
from derm_compress.study import params

ASK = {"variant": "v", "max_new_tokens": 3}


def narrow(most, seen):
    """Work that a GPU has memory for up to `most` at once."""

    def work(part):
        size = part if isinstance(part, int) else len(part)
        seen.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part

    return work


def test_batches_are_halved_and_stay_small():
    seen = []
    done = list(oom.in_parts(narrow(2, seen), [list(range(8)), [8, 9, 10]], "answers"))
    assert [item for part, _ in done for item in part] == list(range(11)) and all(
        part == told for part, told in done
    )
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1]


def test_work_is_begun_again_with_half():
    seen = []
    assert oom.halved(narrow(3, seen), 12, "statistics") == 3 and seen == [12, 6, 3]


@pytest.mark.parametrize(
    "way", [lambda w: list(oom.in_parts(w, [[1, 2]], "answers")), lambda w: oom.halved(w, 2, "it")]
)
def test_one_too_many_is_an_error(way):
    with pytest.raises(DermError, match="out of GPU memory with a batch of one"):
        way(narrow(0, []))


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(oom.in_parts(lambda part: 1 / 0, [[1]], "answers"))
    with pytest.raises(KeyError):  # nor those of who takes the results
        for _ in oom.in_parts(len, [[1]], "answers"):
            raise KeyError


def test_answers_go_on_with_smaller_batches(pico, dataset, monkeypatch, capsys):
    model, processor = pico
    items, real = dataset.of("test")[:4], generate
    whole = answers.answer(model, processor, items, dataset.images, batch_size=2, **ASK)

    def small(model, processor, inputs, **how):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return real(model, processor, inputs, **how)

    monkeypatch.setattr(answers, "generate", small)
    assert answers.answer(model, processor, items, dataset.images, batch_size=4, **ASK).equals(
        whole
    )
    assert "out of GPU memory with 4 at once; going on with 2" in capsys.readouterr().out


@pytest.mark.parametrize("what", ("projection_statistics", "input_peaks"))
def test_calibration_goes_on_with_smaller_batches(
    recipe, store, dataset, tmp_path, monkeypatch, what
):
    known, real = variants_of.pruned(recipe, [], []), getattr(activations, what)
    (tmp_path / "awq4").mkdir()
    save_file({"2.qkv": torch.ones(64)}, tmp_path / "awq4" / "original.safetensors")
    how = {"items": dataset.of("train")[:2], "images": dataset.images, "device": "cpu"}

    def measured(size):
        if what == "input_peaks":
            return per_variant.scaled_channels(tmp_path, "awq4", known, store, batch_size=size, **how)
        return activation_analysis.activation_statistics(known, store, batch_size=size, **how)

    def small(model, batches, *others, **more):
        batches = list(batches)
        if len(batches[0]["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return real(model, batches, *others, **more)

    whole = measured(2)
    monkeypatch.setattr(activations, what, small)
    assert len(whole) and measured(4).equals(whole)


def test_searches_go_on_with_fewer_pictures_of_which_all_questions_are_read(
    recipe, store, dataset, tmp_path, monkeypatch, capsys
):
    known, real, sizes = variants_of.pruned(recipe, [], []), search.search_forms, []
    how = {"items": dataset.of("train")[:2], "images": dataset.images, "device": "cpu"}

    def searched(folder, size):
        folder.mkdir()
        wanted = wanted_frames.asked(["original"], ["awq"], [4], 64)
        per_variant.search_scales(
            folder, wanted, known, store, batch_size=size, **how
        )
        return load_file(folder / "awq4" / "original.safetensors")

    def small(model, batches, *others, **more):
        batches = list(batches)
        sizes.append([len(batch["input_ids"]) for batch in batches])
        if sizes[-1][0] > 3:
            raise torch.OutOfMemoryError
        return real(model, batches, *others, **more)

    whole = searched(tmp_path / "whole", 2)
    monkeypatch.setattr(search, "search_forms", small)
    found = searched(tmp_path / "small", 7)
    assert sizes == [[6], [3, 3]] and "with 2 at once; going on with 1" in capsys.readouterr().out
    assert all(torch.equal(found[key], s) for key, s in whole.items())


def test_rankings_go_on_with_smaller_batches(pico, dataset, monkeypatch, capsys):
    c = Calibration(
        *pico, dataset.of("train")[:3], dataset.images, batch_size=6, max_new_tokens=4
    )
    whole, real = measure.measure_importance(["perplexity"], c, files.Journal()), Calibration.readings

    def small(c, *words, **how):
        if c.batch_size > 3:
            raise torch.OutOfMemoryError
        return real(c, *words, **how)

    monkeypatch.setattr(Calibration, "readings", small)
    assert (
        measure.measure_importance(["perplexity"], c, files.Journal()).value.sub(whole.value).abs().max()
        < 1e-5
    )
    assert (
        "ranking perplexity: out of GPU memory with 6 at once; going on with 3"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(Calibration, "readings", lambda c, units: narrow(0, [])(1))
    with pytest.raises(
        DermError, match="ranking perplexity: out of GPU memory with a batch of one"
    ):
        measure.measure_importance(["perplexity"], dataclasses.replace(c, batch_size=1), files.Journal())


def test_answers_of_iterative_rankings_go_on_with_smaller_batches(pico, dataset, monkeypatch):
    c = Calibration(
        *pico, dataset.of("train")[:2], dataset.images, batch_size=4, max_new_tokens=4
    )
    ranking = Ranking.of("output_similarity-iterative")
    whole, real = whole_answers(ranking, c), Calibration.answers

    def small(c, units):
        if c.batch_size > 2:
            raise torch.OutOfMemoryError
        return real(c, units)

    monkeypatch.setattr(Calibration, "answers", small)
    assert whole_answers(ranking, c) == whole


def test_the_sentence_transformer_leaves_the_gpu_to_the_model():
    cells = params.read_notebooks(Path(__file__).parents[2])["03_layer_importance"].code()
    assert any("Embedder(stage.p.embedder)," in cell for cell in cells)
    assert Embedder().device == "cpu"


def test_figure_4_out_of_memory_is_one_clear_line(recipe, store, dataset, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(activations, "projection_output", full)
    how = {"items": dataset.of("train")[:1], "images": dataset.images, "device": "cpu"}
    with pytest.raises(DermError, match="Figure 4 of original: out of GPU memory"):
        activation_analysis.activation_surface(
            variants_of.pruned(recipe, [], []), store, block=30, projection="q_proj", **how
        )


def test_training_says_what_to_set(dataset, tmp_path, monkeypatch):
    model, processor = loading.load_base("pico")
    training = train.Training(rank=2, alpha=2, learning_rate=1e-3, steps=1, batch_size=2, seed=0)

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "backward", full)
    with pytest.raises(
        DermError, match="fine-tuning x: out of GPU memory; set finetune_batch or sft_batch lower"
    ):
        train.train(
            model, processor, dataset.of("train"), dataset.images, training,
            checkpoint=tmp_path / "c", what="fine-tuning x",
        )  # fmt: skip
