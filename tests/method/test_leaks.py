"""No test or held-out picture reaches a fit, a search, a calibration or a choice."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from derm_compress.data.items import Dataset, sample, save_dataset
from derm_compress.method.finetune import jobs, train
from derm_compress.method.quantization import search
from derm_compress.method.quantization import wanted as wanted_frames
from derm_compress.model import variants as variants_of

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("0[2-79]*.ipynb"))
UNSEEN = ("test", "heldout")


def code(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ast.parse("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))


def splits(node):
    """Splits that an expression takes from the data set."""
    calls = [
        n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "dataset.of"
    ]
    return {call.args[0].value for call in calls}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_before_evaluation_unseen_pictures_are_only_asked_about(path):
    """02 to 07 and 09 answer about test pictures, and 02 looks at one; nothing else sees them."""
    for statement in code(path).body:
        if splits(statement) & set(UNSEEN):
            value = statement.value
            looked_at = isinstance(value, ast.Subscript) and path.stem == "02_finetune"
            assert looked_at or isinstance(value, ast.Call), ast.unparse(statement)
            if not looked_at:
                called, function = (ast.unparse(one) for one in (value.func, value.args[1]))
                if function == "evaluate.measure_quantized":  # (variants, items, unseen, images)
                    assert [splits(one) for one in value.args[2:]] == [
                        set(),
                        {"test"},
                        set(),
                        set(),
                    ]
                else:
                    assert called == "stage.frame" and function.startswith("evaluate.answer")
                    assert value.args[0].value.startswith("answers")


def test_calibrations_and_choices_read_training_and_development_pictures():
    found = {path.stem[:2]: splits(code(path)) - set(UNSEEN) for path in NOTEBOOKS}
    assert found["03"] == found["06"] == found["07"] == {"train"}
    assert found["04"] == found["09"] == {"dev", "train"}
    assert "heldout" not in splits(code(NOTEBOOKS[2]))


def scrambled(dataset):
    """The same data set with noise for every unseen picture and other answers expected of them."""
    images = dataset.images.copy()
    unseen = [i for i in dataset.items if i.split in UNSEEN]
    rng = np.random.default_rng(0)
    images[[i.row for i in unseen]] = rng.integers(
        0, 255, images[[i.row for i in unseen]].shape, np.uint8
    )
    items = [dataclasses.replace(i, disease="rosacea") if i in unseen else i for i in dataset.items]
    return Dataset(tuple(items), images)


def test_fine_tuning_gives_the_same_bytes_whatever_the_unseen_pictures_are(
    dataset, recipe, store, tmp_path
):
    training = train.Training(rank=2, alpha=2, learning_rate=1e-2, steps=2, batch_size=4, seed=0)
    job, made = jobs.Job("original", "original", recipe.to_json(), training), []
    for name, version in (("a", dataset), ("b", scrambled(dataset))):
        folder, scratch, kept = (tmp_path / name / part for part in ("out", "scratch", "data"))
        for path in (folder, scratch, kept):
            path.mkdir(parents=True)
        save_dataset(kept, version)
        jobs.fine_tune_all(folder, [job], data=kept, store=store, scratch=scratch, processes=1)
        made.append((folder / "original" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_the_scale_search_reads_its_items_alone(dataset, recipe, store, tmp_path):
    made = []
    for name, version in (("a", dataset), ("b", scrambled(dataset))):
        (tmp_path / name).mkdir()
        source = variants_of.pruned(recipe, [], [])
        how = {
            "items": sample(version.of("train"), 2, 0),
            "images": version.images,
            "batch_size": 6,
        }
        wanted = wanted_frames.asked(source.variant, ["awq"], [4], 64)
        search.search_scales(tmp_path / name, wanted, source, store=store, device="cpu", **how)
        made.append((tmp_path / name / "awq4/original.safetensors").read_bytes())
    assert made[0] == made[1]
