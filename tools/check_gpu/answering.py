"""Answers and criteria of the tiny model beside the CPU's, and the memory that they take."""

import contextlib
import gc
import io
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from derm_compress import evaluate, method
from derm_compress.evaluate import dealing
from derm_compress.files import Journal
from derm_compress.method.importance.criteria import CRITERIA
from derm_compress.method.iterate import each_model
from derm_compress.model import devices, loading, removal, variants
from derm_compress.model.processors import read_processor
from derm_compress.model.units import Unit
from tools.check_gpu import Skip, check, rig

UNITS = [None, *map(Unit.of, (2, 11, "0.mlp", "1.attention"))]


def told(model, processor, data, batch: int = 6, tokens: int = 24) -> list[str]:
    """A model's answers about the test pictures."""
    how = {"variant": "v", "batch_size": batch, "max_new_tokens": tokens}
    return evaluate.answer(model, processor, data.of("test"), data.images, **how).answer.tolist()


@check(90)
def image_processor(device, folder):
    """Pictures are read alike with torchvision, as on Kaggle, and without."""
    import torchvision  # noqa: F401
    from transformers import CLIPImageProcessorPil

    config, processor = rig.config_of()
    processor.save_pretrained(folder)
    read_processor("7B", str(folder), config)  # refuses one that does not fit
    pictures = list(np.random.default_rng(0).integers(0, 255, (4, 336, 336, 3), dtype=np.uint8))
    makers = processor.image_processor, CLIPImageProcessorPil.from_pretrained(folder)
    one, other = (made(pictures, return_tensors="pt")["pixel_values"] for made in makers)
    far = float((one - other).abs().max())
    assert far < 0.02, f"{far} apart"
    return f"{type(processor.image_processor).__name__}, within {far:.1e}"


@check(200)
def answers(device, folder):
    """In fp32 answers are the CPU's in any batch, also by a T4's kernels; fp16 repeats itself."""
    data = rig.drawn()
    expected = told(*loading.load_base("tiny"), data)
    model = loading.load_base("tiny", device, torch.float32)
    assert told(*model, data) == told(*model, data, batch=1) == expected, "not the CPU's"
    half = loading.load_base("tiny", device)
    said = told(*half, data)
    assert said == told(*half, data), "two runs differ"
    rig.be_t4(device)
    assert told(*model, data, batch=2) == expected, "not the CPU's by a T4's kernels"
    return f"{np.mean(np.array(said) == expected):.2f} of half precision's are fp32's"


@check(200)
def drafts(device, folder):
    """In fp32 what stands of drafts is what is said without the part itself."""
    data = rig.drawn(1, 2)
    asked = *loading.load_base("tiny", device, torch.float32), data.of("test"), data.images
    how = {"batch_size": 4, "max_new_tokens": 24}
    found = {one.key: text for one, text in method.Calibration(*asked, **how).answers(UNITS[1:])}
    assert len(set(found.values())) > 6, "nothing changes what is said"  # of six questions
    for unit in UNITS:
        with removal.without(asked[0], [unit] if unit else []):
            frame = evaluate.answer(*asked, variant="v", **how)
        for row in frame.itertuples():
            assert found.pop((unit, row.item, row.question)) == row.answer, (unit, row.answer)
    assert not found
    return f"{len(UNITS)} models"


@check(220)
def criteria(device, folder):
    """Every criterion orders blocks as on the CPU."""
    data = rig.drawn(3, 1)
    names = [one.name for one in CRITERIA.values() if one.weighs]
    names.remove("output_similarity")  # by answers, which are compared above

    def values(where):
        asked = *loading.load_base("tiny", where), data.of("train"), data.images
        frame = method.measure_importance(names, method.Calibration(*asked), Journal())
        return frame.groupby(["unit", "ranking"]).value.mean().unstack()

    alike = values(device).corrwith(values("cpu"), method="spearman")
    assert len(alike) == len(names) and (alike > 0.9).all(), alike.to_dict()
    return f"rank correlations {alike.round(3).to_dict()}"


@check(150)
def two_devices(device, folder):
    """In fp32 a model over two GPUs says what it says on one."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    data = rig.drawn()
    model, processor = loading.load_base("tiny", device, torch.float32)

    def said():
        with removal.without(model, [5, 25]):
            less = told(model, processor, data, tokens=12)
        return told(model, processor, data, tokens=12), less

    before = said()
    devices.spread(model, 2)
    assert devices.is_spread(model) and before == said() and before[0] != before[1]
    return "with and without two blocks"


@check(200)
def dealt(device, folder):
    """Two GPUs, each with a process and a model of its own, say what one says."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    data, recipe = rig.drawn(), rig.tiny_recipe()
    rows = [variants.variant(f"v{n}", recipe.pruned(range(n))) for n in (32, 27)]
    asked = pd.DataFrame(rows), data.of("test"), data.images
    how = {"device": device, "batch_size": 2, "max_new_tokens": 24, "store": rig.Stored(folder)}
    both = evaluate.answer_variants(*asked, **how)
    with patch.object(dealing, "cards", lambda device: [device]):
        alone = evaluate.answer_variants(*asked, **how)
    assert both.equals(alone), f"{(both.answer != alone.answer).sum()} of {len(both)} differ"
    return f"{len(both)} answers"


@check(150)
def halving(device, folder):
    """What exceeds a GPU's memory goes on with half as many at once, and says the same in fp32."""
    rig.need_gpu(device)
    data, said = rig.drawn(1, 64), io.StringIO()
    model = loading.load_base("tiny", device, torch.float32)
    free, total = told(*model, data, 64), torch.cuda.mem_get_info()[1]
    for more in (48, 32, 24, 16, 12, 8):
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() + more * 2**20
        torch.cuda.set_per_process_memory_fraction(held / total)
        with contextlib.redirect_stdout(said):
            assert told(*model, data, 64) == free, "other answers"
        if "going on with" in said.getvalue():
            return said.getvalue().strip().splitlines()[-1]
    raise AssertionError("memory was never exceeded")


@check(150)
def given_back(device, folder):
    """Models that were let go leave nothing on a GPU, however many there were."""
    rig.need_gpu(device)
    data, recipe, held = rig.drawn(1, 2), rig.tiny_recipe(), []
    recipes = [recipe, *(recipe.pruned(range(n)) for n in (31, 30, 28))]
    rows = pd.DataFrame([variants.variant(f"v{i}", one) for i, one in enumerate(recipes)])
    for _ in range(3):
        for turn in each_model(rows, rig.Stored(folder), device, "variants"):
            told(turn.model, turn.processor, data, tokens=4)
        del turn
        gc.collect()
        held.append(torch.cuda.memory_allocated() / 2**20)
    assert held[-1] - held[0] < 2, f"MiB after each round: {held}"
    return f"{held[-1]:.1f} MiB after {len(held)} rounds"
