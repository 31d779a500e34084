"""All eight notebooks on the random pico model, through the runner; then the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
TABLES = {
    "table1_pruning": ["blocks_removed", "fraction_removed", "score", "score_lo", "score_hi", "n"],
    "table2_sft": [
        "blocks_removed",
        "score_before",
        "score_before_lo",
        "score_after",
        "score_after_hi",
        "seconds",
    ],
    "table3_quantization": ["blocks_removed", "healed", "method", "bits", "score", "n"],
    "table4_efficiency": [
        "variant",
        "bits",
        "decode_ms_per_token",
        "prefill_ms",
        "total_ms_per_token",
        "score",
    ],
    "table5_ablation": ["setting", "score", "score_lo", "score_hi", "n"],
}
SHARED = ["params_b", "vram_gib", "blocks_removed_7b", "params_b_7b", "vram_gib_7b"]
FIGURES = [
    "fig1_pipeline", "fig2_block_removal", "fig3_layer_importance", "fig4_activations",
    "fig5_case_studies", "fig6_judge_prompt", "fig7_iterative_pruning",
]  # fmt: skip


def project(folder):
    """A project in a path with a space: the real notebooks and run files, the installed package."""
    root = folder / "the study"
    root.mkdir()
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, root / name)
    return root


def command(root, *words):
    env = os.environ | {"DERM_COMPRESS_ROOT": str(root), "HF_HUB_OFFLINE": "1"}
    asked = [sys.executable, "-m", "derm_compress", *words]
    return subprocess.run(asked, cwd=root, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("smoke"))
    done = command(root, "run", "params/smoke.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def test_every_table_has_its_columns(study):
    for stem, columns in TABLES.items():
        frame = pd.read_csv(study / "reports/smoke/tables" / f"{stem}.csv")
        assert set(columns + SHARED) <= set(frame.columns) and len(frame), stem
        assert (study / "reports/smoke/tables" / f"{stem}.md").exists()
    table2 = pd.read_csv(study / "reports/smoke/tables/table2_sft.csv")
    assert table2.blocks_removed.tolist() == [0, 1, 2, 3]
    equal = pd.read_csv(study / "reports/smoke/tables/extra_equal_bytes.csv")
    assert (
        set(equal.budget) == {3}
        and set(equal.blocks_removed) == {0, 1}
        and set(equal.healed) == {False, True}
    )
    variants = pd.read_parquet(next((study / "artifacts/store/05_sft").glob("*/variants.parquet")))
    assert sorted(variants.variant[variants.sft_seed == 1]) == ["original+sft~1", "pruned-2+sft~1"]


def test_one_file_holds_every_answer_and_statistics_stand_beside_the_tables(study):
    (file,) = (study / "artifacts/store/08_evaluation").glob("*/predictions.parquet")
    frame = pd.read_parquet(file)
    assert {
        "variant",
        "item",
        "question",
        "split",
        "answer",
        "score",
        "fact_f1",
        "similarity",
    } <= set(frame)
    assert (
        set(frame.split) == {"test", "heldout"}
        and not frame.duplicated(["variant", "item", "question"]).any()
    )
    named = study / "reports/smoke/tables"
    for stem in ("latency", "comparisons", "power", "diagnosis", "secondary"):
        assert len(pd.read_csv(named / f"extra_{stem}.csv")), stem
    assert set(pd.read_csv(named / "extra_latency.csv").batch) == {1, 4}
    assert (
        pd.read_csv(named / "table2_sft.csv").train_peak_gib.between(0, 0.1).all()
    )  # planned, not the process's


def test_every_figure_is_drawn(study):
    for stem in FIGURES:
        for ending in ("png", "svg"):
            assert (study / "reports/smoke/figures" / f"{stem}.{ending}").stat().st_size > 1000, (
                stem
            )


def test_the_report_names_its_stages_and_no_path_of_this_machine(study):
    told = json.loads((study / "reports/smoke/run.json").read_text())
    assert len(told["stages"]) == 8 and all(
        {"key", "seconds", "cached"} <= set(s) for s in told["stages"].values()
    )
    assert told["run_info"]["seconds"] > 0 and told["environment"]
    for path in (study / "reports/smoke").rglob("*"):
        if path.suffix in (".html", ".md", ".json", ".csv"):
            text = path.read_text("utf-8")
            assert str(study) not in text and str(Path.home()) + "/" not in text, path.name
    assert len(list((study / "reports/smoke/notebooks").glob("*.html"))) == 8


def test_any_ranking_may_be_the_studys_own(study):
    """Notebooks 03 and 04 with another criterion first, on the stages before them as they are."""
    more = "run=other rankings=[perplexity, magnitude] depths=[8] rival_depths=[8]"
    made = []
    for stage in ("03_layer_importance", "04_pruning"):
        done = command(study, "run", "params/smoke.yaml", "--only", stage, "--set", more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        note = json.loads((study / f"artifacts/runs/other/{stage}.json").read_text())
        made.append(study / "artifacts/store" / stage / note["key"])
    order = json.loads((made[0] / "plans.json").read_text())["perplexity"]["order"]
    variants = pd.read_parquet(made[1] / "variants.parquet").set_index("variant")
    kept = json.loads(variants.recipe["pruned-2"])["steps"][-1]["kept"]
    assert variants.criterion["pruned-2"] == "perplexity" and "pruned-2-magnitude" in variants.index
    assert set(range(8)) - set(kept) == set(order[:2])


def test_a_stage_made_anew_in_another_folder_has_the_same_results(study, tmp_path):
    """A fine-tune and its answers, digest by digest."""
    other, stage = project(tmp_path), "02_finetune"
    (data,) = study.glob("artifacts/store/01_data/*")
    shutil.copytree(data, other / data.relative_to(study))
    done = command(other, "run", "params/smoke.yaml", "--only", stage)
    assert done.returncode == 0, done.stdout[-2000:]
    manifests = [
        next(root.glob(f"artifacts/store/{stage}/*/manifest.json")) for root in (study, other)
    ]
    results = [json.loads(path.read_text())["results"] for path in manifests]
    assert manifests[0].parent.name == manifests[1].parent.name and results[0] == results[1]


OPEN = """
import sys
from transformers import LlavaForConditionalGeneration

for path in sys.argv[1:]:
    model, told = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    print(len(model.model.language_model.layers))
assert "derm_compress" not in sys.modules
"""


def test_an_exported_model_opens_with_plain_transformers(study):
    done = command(study, "export", "smoke/05_sft", str(study / "healed"))
    assert done.returncode == 0, done.stderr
    asked = [sys.executable, "-W", "ignore", "-c", OPEN, study / "healed"]
    opened = subprocess.run(asked, capture_output=True, text=True)
    assert opened.stdout.split() == ["6"], opened.stderr
