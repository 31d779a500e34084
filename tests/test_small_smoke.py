"""All eight notebooks on a cut of the small model: grouped heads, a tied head, ChatML."""

import os

import pandas as pd
import pytest
import smollm2_cut
from test_smoke import command, project

from derm_compress.model import gguf_llama, small

RUN = """\
run: cut
model: cut
n_train: 48
n_dev: 4
n_test: 4
n_heldout: 2
max_new_tokens: 4
finetune_steps: 2
finetune_batch: 2
importance_items: 2
rankings: [output_similarity, magnitude]
protected: [0]
operating_blocks: 16
depths: [16]
rival_depths: [16]
sft_steps: 2
sft_batch: 2
processes: 1
activation_items: 1
quantization_items: 1
methods: [awq, bitsandbytes, rtn]
bits: [4, 3]
latency_tokens: 4
latency_repeats: 3
"""


@pytest.mark.skipif(not os.environ.get("DERM_COMPRESS_LONG"), reason="a minute, if asked for")
def test_the_study_runs_on_a_cut_of_the_small_model(tmp_path):
    root = project(tmp_path)
    file = smollm2_cut.write_gguf(tmp_path / "cut.gguf", blocks=2, heads=3, kv_heads=1, mlp=320)
    language_model = gguf_llama.read_language_model(file, **small.SPECIAL)
    tower = smollm2_cut.write_tower(tmp_path / "tower", language_model)
    (root / "cut").mkdir()
    small.assemble(language_model, tower, root / "cut")
    (root / "params" / "cut.yaml").write_text(RUN)
    done = command(root, "run", "params/cut.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = pd.read_csv(root / "reports/cut/tables/table3_quantization.csv")
    assert set(table.blocks_removed) == {0, 1} and set(table.method) == {
        "awq",
        "bitsandbytes",
        "rtn",
    }
