"""Batches that exceed a GPU's memory: begun again with fewer, or one line that says what to set."""

import pytest
import torch
from safetensors.torch import load_file

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.evaluate import answers
from derm_compress.method import activation_analysis, activations
from derm_compress.method.finetune import train
from derm_compress.method.importance import measure
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.quantization import search
from derm_compress.method.quantization import wanted as wanted_frames
from derm_compress.model import oom, writing
from derm_compress.model import variants as variants_of


def narrow(most, seen):
    """Work that a GPU has memory for up to `most` at once."""

    def work(size):
        seen.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    return work


def full(*_, **__):
    raise torch.OutOfMemoryError


def test_work_is_begun_again_with_half():
    seen = []
    assert oom.halved(narrow(3, seen), 12, "statistics") == 3 and seen == [12, 6, 3]


def test_one_too_many_is_an_error():
    with pytest.raises(DermError, match="out of GPU memory with a batch of one"):
        oom.halved(narrow(0, []), 2, "it")


def test_answers_go_on_with_smaller_batches(pico, dataset, monkeypatch, capsys):
    def answered(size):
        how = {"variant": "v", "batch_size": size, "max_new_tokens": 3}
        return answers.answer(*pico, dataset.of("test")[:4], dataset.images, **how)

    class Small(writing.Writer):
        def __init__(self, *model, lines, **how):
            narrow(6, sizes)(lines)
            super().__init__(*model, lines=lines, **how)

    sizes, whole = [], answered(3)
    monkeypatch.setattr(writing, "Writer", Small)
    assert answered(12).equals(whole) and sizes == [12, 6]
    assert "out of GPU memory with 12 at once; going on with 6" in capsys.readouterr().out
    sizes.clear()
    assert len(answered(3)) == 12 and sizes == [3, 3]


def test_searches_go_on_with_fewer_pictures_of_which_all_questions_are_read(
    recipe, store, dataset, tmp_path, monkeypatch
):
    known, real, sizes = variants_of.pruned(recipe, [], []), search.search_forms, []
    how = {"items": dataset.of("train")[:2], "images": dataset.images, "device": "cpu"}
    how["store"] = store

    def searched(folder, size):
        folder.mkdir()
        wanted = wanted_frames.asked(["original"], ["awq"], [4], 64)
        search.search_scales(folder, wanted, known, batch_size=size, **how)
        return load_file(folder / "awq4" / "original.safetensors")

    def small(model, batches, *others, **more):
        batches = list(batches)
        sizes.append([len(batch["input_ids"]) for batch in batches])
        narrow(3, [])(sizes[-1][0])
        return real(model, batches, *others, **more)

    whole = searched(tmp_path / "whole", 2)
    monkeypatch.setattr(search, "search_forms", small)
    found = searched(tmp_path / "small", 7)
    assert sizes == [[6], [3, 3]]
    assert all(torch.equal(found[key], scales) for key, scales in whole.items())


def test_rankings_go_on_with_smaller_batches(pico, dataset, monkeypatch):
    c = Calibration(*pico, dataset.of("train")[:3], dataset.images, batch_size=6, max_new_tokens=4)
    real = Calibration.reading

    def small(c, *words, **how):
        narrow(3, [])(c.batch_size)
        return real(c, *words, **how)

    whole = measure.measure_importance(["perplexity"], c, files.Journal()).value
    monkeypatch.setattr(Calibration, "reading", small)
    found = measure.measure_importance(["perplexity"], c, files.Journal()).value
    assert found.sub(whole).abs().max() < 1e-5
    monkeypatch.setattr(Calibration, "reading", full)
    with pytest.raises(DermError, match="ranking perplexity: out of GPU memory"):
        measure.measure_importance(["perplexity"], c, files.Journal())


def test_figure_4_out_of_memory_is_one_clear_line(recipe, store, dataset, monkeypatch):
    monkeypatch.setattr(activations, "projection_output", full)
    how = {"items": dataset.of("train")[:1], "images": dataset.images, "device": "cpu"}
    how["store"] = store
    known = variants_of.pruned(recipe, [], [])
    with pytest.raises(DermError, match="Figure 4 of original: out of GPU memory"):
        activation_analysis.activation_surface(known, block=30, projection="q_proj", **how)


def test_training_says_what_to_set(pico, dataset, tmp_path, monkeypatch):
    training = train.Training(rank=2, alpha=2, learning_rate=1e-3, steps=1, batch_size=2, seed=0)
    monkeypatch.setattr(torch.autograd, "grad", full)
    where = {"checkpoint": tmp_path / "c", "what": "fine-tuning x"}
    with pytest.raises(DermError, match="x: out of GPU memory; set finetune_batch or sft_batch"):
        train.train(*pico, dataset.of("train"), dataset.images, training, **where)
