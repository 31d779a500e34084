"""All notebooks but the optional ninth on the random pico model, by the runner; then the report."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fabricate import UNASKED
from runs import ROOT, project
from transformers import LlavaForConditionalGeneration

from derm_compress.report.figures import FIGURES


def command(root, *words):
    env = os.environ | {"DERM_COMPRESS_ROOT": str(root), "HF_HUB_OFFLINE": "1"}
    asked = [sys.executable, "-m", "derm_compress", *words]
    return subprocess.run(asked, cwd=root, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("smoke") / "the study")
    done = command(root, "run", "params/smoke.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def test_every_table_and_figure_is_there(study):
    """With the columns of the made-up study's, which are kept byte by byte."""
    made = study / "reports/smoke"
    for kept in (ROOT / "tests/report/golden").glob("*.csv"):
        frame = pd.read_csv(made / "tables" / kept.name)
        assert set(pd.read_csv(kept, nrows=0)) <= set(frame) and len(frame), kept.stem
    for stem, end in itertools.product(FIGURES.keys() - UNASKED, ("png", "svg", "csv")):
        assert (made / "figures" / f"{stem}.{end}").stat().st_size > 0, stem
    assert len([*(made / "notebooks").glob("*.html")]) == 8


def test_tables_hold_what_was_asked_for(study):
    tables = study / "reports/smoke/tables"
    table2 = pd.read_csv(tables / "table2_sft.csv")
    assert table2.blocks_removed.tolist() == [0, 1, 2, 3]
    assert table2.train_peak_gib.between(0, 0.1).all()  # planned, not the process's
    equal = pd.read_csv(tables / "extra_equal_bytes.csv")
    assert set(equal.budget) == {3} and set(equal.blocks_removed) == {0, 1}
    assert set(equal.healed) == {False, True}
    assert set(pd.read_csv(tables / "extra_latency.csv").batch) == {1, 4}
    variants = pd.read_parquet(next((study / "artifacts/store/05_sft").glob("*/variants.parquet")))
    assert sorted(variants.variant[variants.sft_seed == 1]) == ["original+sft~1", "pruned-2+sft~1"]


def test_one_file_holds_every_answer(study):
    (file,) = (study / "artifacts/store/08_evaluation").glob("*/predictions.parquet")
    frame = pd.read_parquet(file)
    assert {"answer", "score", "fact_f1", "similarity"} <= set(frame)
    assert set(frame.split) == {"test", "heldout"}
    assert not frame.duplicated(["variant", "item", "question"]).any()


def test_the_report_names_its_stages_and_no_path_of_this_machine(study):
    told = json.loads((study / "reports/smoke/run.json").read_text())
    assert len(told["stages"]) == 8 and told["run_info"]["seconds"] > 0 and told["environment"]
    for path in (study / "reports/smoke").rglob("*"):
        if path.suffix in (".html", ".md", ".json", ".csv"):
            text = path.read_text("utf-8")
            assert str(study) not in text and f"{Path.home()}/" not in text, path.name


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
    other, stage = project(tmp_path / "other"), "02_finetune"
    (data,) = study.glob("artifacts/store/01_data/*")
    shutil.copytree(data, other / data.relative_to(study))
    done = command(other, "run", "params/smoke.yaml", "--only", stage)
    assert done.returncode == 0, done.stdout[-2000:]
    note = f"artifacts/store/{stage}/*/manifest.json"
    manifests = [next(root.glob(note)) for root in (study, other)]
    results = [json.loads(path.read_text())["results"] for path in manifests]
    assert manifests[0].parent.name == manifests[1].parent.name and results[0] == results[1]


def test_an_exported_model_opens_with_plain_transformers(study):
    done = command(study, "export", "smoke/05_sft", str(study / "healed"))
    assert done.returncode == 0, done.stderr
    how = {"output_loading_info": True}
    model, told = LlavaForConditionalGeneration.from_pretrained(study / "healed", **how)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert len(model.model.language_model.layers) == 6
