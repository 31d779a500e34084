"""All notebooks on a cut of the small model: two blocks, grouped heads, a tied head, ChatML."""

import json

import pandas as pd
import pytest
import smollm2_cut
from runs import project

from derm_compress.model import gguf_llama, small
from derm_compress.report.tables.allocation import running_bytes
from derm_compress.study.params import read_notebooks

RUN = """\
run: cut
model: cut
n_train: 16
n_dev: 2
n_test: 2
n_heldout: 2
max_new_tokens: 2
finetune_steps: 1
finetune_batch: 2
importance_items: 1
rankings: [output_similarity, magnitude]
protected: [0]
operating_blocks: 16
depths: [16]
control_items: 1
rival_depths: [16]
sft_steps: 1
sft_batch: 2
processes: 1
activation_items: 1
quantization_items: 1
methods: [awq, rtn]
latency_tokens: 4
latency_repeats: 3
budget_gib: [6]
allocation_items: 1
decision_items: 1
"""


def write_model(folder, scratch):
    """A model folder as the small model's, of a GGUF of two blocks."""
    file = smollm2_cut.write_gguf(scratch / "cut.gguf", blocks=2, heads=3, kv_heads=1, mlp=320)
    language_model = gguf_llama.read_language_model(file, **small.SPECIAL)
    folder.mkdir()
    tower = smollm2_cut.write_tower(scratch / "tower", language_model)
    small.assemble(language_model, tower, folder)


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = project(tmp_path / "the study")
    write_model(root / "cut", tmp_path)
    (root / "params" / "cut.yaml").write_text(RUN)
    monkeypatch.setenv("DERM_COMPRESS_ROOT", str(root))
    monkeypatch.setenv("DERM_COMPRESS_PARAMS", str(root / "params" / "cut.yaml"))
    return root


def test_the_notebooks_run_where_operating_and_deeper_depth_are_one(root):
    """In this process, as kernels would take a minute, and without most figures."""
    for name, notebook in read_notebooks(root).items():
        values = {"display": str}
        for cell in notebook.code(figures=name > "07"):
            exec(compile(cell, name, "exec"), values)
    choice = json.loads(next(root.glob("artifacts/store/04_pruning/*/choice.json")).read_text())
    assert choice["operating"] == choice["deeper"] == 1
    (made,) = root.glob("artifacts/store/07_quantization/*/answers.parquet")
    assert {"original|awq4", "pruned-1+sft|rtn4"} <= set(pd.read_parquet(made).variant)
    (made,) = root.glob("artifacts/store/09_allocation/*/allocations.parquet")
    table = pd.read_parquet(made)
    assert (table.bytes_planned <= table.budget_bytes)[table.budget_gib.notna()].all()
    (made,) = root.glob("artifacts/store/09_allocation/*/held.parquet")
    held = pd.read_parquet(made).set_index("variant").held
    chosen = table[table.way == "joint"].iloc[0]
    running = running_bytes(json.loads(chosen.allocation))
    assert held[chosen.variant] == chosen.bytes_planned - running < chosen.bytes_planned
