"""A made-up finished run, file by file as the stages leave them, for the tests of tables, figures and report."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import nbformat
import numpy as np
import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.evaluate import secondary
from derm_compress.evaluate.judges import controls, judge
from derm_compress.report.results import Results, load_results

BLOCKS, DEPTHS, OPERATING, DEEPER = 32, (0, 2, 4, 6, 7, 8, 9, 10, 12), 6, 9
DEEP = (14, 16)  # of a full study; the published plan has 14 blocks
SUBLAYERS = {"output_similarity-attention": "attention", "output_similarity-mlp": "mlp"}
PLANS = {  # rivals of a full study, and how much worse than the study's own criterion they are made
    "output_similarity-iterative": -0.1, "output_similarity-text": 0.05, "perplexity": -0.3, "perplexity-text": -0.1,
    "block_influence": 0.1, "block_influence-contiguous": 0.2, "angular": 0.1, "angular-contiguous": 0.25,
    "taylor": 0.3, "taylor-unprotected": 0.9, "magnitude": 0.2, "last": 0.7, "published": 0.6,
}  # fmt: skip
FULL = {  # rankings beside the three small ones: the noise between them and the planted order; None: no data
    "output_similarity-text": 0.15, "perplexity": 0.05, "perplexity-text": 0.3, "block_influence": 0.2,
    "block_influence-text": 0.1, "angular": 0.2, "angular-text": 0.2, "taylor": 0.5, "taylor-text": 0.6,
    "random-1": None, "random-2": None, "random-3": None, "random-4": None, "last": None,
    **dict.fromkeys(SUBLAYERS, 0.1),
}  # fmt: skip
UPSTREAM = {
    "01_data": (),
    "02_finetune": ("01_data",),
    "03_layer_importance": ("01_data", "02_finetune"),
    "04_pruning": ("01_data", "02_finetune", "03_layer_importance"),
    "05_sft": ("01_data", "02_finetune", "03_layer_importance", "04_pruning"),
    "06_activation_analysis": ("01_data", "02_finetune", "04_pruning", "05_sft"),
    "07_quantization": ("01_data", "02_finetune", "04_pruning", "05_sft"),
}
UPSTREAM["08_evaluation"] = tuple(UPSTREAM)
EVIL = "<script>alert('planted')</script><img src=x onerror=alert(1)> $\\frac{1}{2$ </s>"
NOTED = {
    "source": "synthetic",
    "counts": {"train": {"rosacea": 1737}},
    "groups": 9,
    "largest_group": 2,
    "notes": [],
}
NOTED |= {"excluded": {"NEV": 3}, "unreadable": [{"image": EVIL, "reason": "truncated"}]}
FACTS = {
    "count": "few",
    "size": "small",
    "colour": "red",
    "border": "sharp",
    "surface": "scaly",
    "site": "face",
}


def variant(name, blocks=0, *, criterion="", healed=False, method="fp16", bits=16):
    return {
        "variant": name, "source": name,
        "blocks_removed": blocks, "criterion": criterion, "healed": healed, "method": method,
        "bits": bits, "group_size": 64, "recipe": '{"base": "tiny"}', "attentions_removed": 0, "mlps_removed": 0,
        "sft_seed": 0, "quantizer": "",
    }  # fmt: skip


def quantized(row, method, bits=4):
    name = f"{row['variant']}|{method}{bits}"
    return row | {"variant": name, "method": method, "bits": bits, "quantizer": method}


def variants():
    """Every variant of the study as one frame, and the level (1..4) its answers are drawn around."""
    pruned = [
        variant(f"pruned-{n}" if n else "original", n, criterion="output_similarity" if n else "")
        for n in DEPTHS
    ]
    magnitude = [
        variant(f"pruned-{n}-magnitude", n, criterion="magnitude") for n in (OPERATING, DEEPER)
    ]
    healed = [
        variant("original+sft", healed=True),
        variant("pruned-6+sft", 6, criterion="output_similarity", healed=True),
        variant("pruned-9+sft", 9, criterion="output_similarity", healed=True),
        variant("pruned-6-magnitude+sft", 6, criterion="magnitude", healed=True),
    ]
    packed = [
        quantized(row, method)
        for row in (pruned[0], pruned[3], healed[1], healed[2], healed[3])
        for method in ("awq", "bitsandbytes", "rtn", "rtn_symmetric")
    ]
    return pd.DataFrame(pruned + magnitude + healed + packed)


def rival_variants():
    """Every other plan of a full study at nine depths, before SFT; the published one ends before the last of them."""
    rows = [variant(f"pruned-{n}", n, criterion="output_similarity") for n in DEEP]
    for name in [*PLANS, "random-0", "random-1", "random-2", *SUBLAYERS]:
        part = SUBLAYERS.get(name)
        for n in (
            2,
            4,
            6,
            8,
            9,
            10,
            12,
            *(() if part else DEEP[:1] if name == "published" else DEEP),
        ):
            row = variant(f"pruned-{n}-{name}", 0 if part else n, criterion=name)
            if (name, n) != ("magnitude", OPERATING) and (name, n) != ("magnitude", DEEPER):
                rows.append(row | ({f"{part}s_removed": n} if part else {}))
    return pd.DataFrame(rows)


def seeds():
    """Two further trainings of the healed model and its control."""
    rows = [
        (name, blocks, i) for name, blocks in (("original", 0), ("pruned-6", 6)) for i in (1, 2)
    ]
    names = {0: "", 6: "output_similarity"}
    return pd.DataFrame(
        [
            variant(f"{name}+sft~{i}", n, criterion=names[n], healed=True) | {"sft_seed": i}
            for name, n, i in rows
        ]
    )


def level(row):
    """The mean grade a variant's answers get: a plateau, a cliff, healing, and a price for four bits."""
    grade = (
        3.4
        - 0.13 * row.blocks_removed
        - PLANS.get(row.criterion, 0.3 if "random" in row.criterion else 0.0)
    )
    grade += 0.1 * row.blocks_removed if row.healed else 0.0
    grade -= 0.05 * row.attentions_removed + 0.1 * row.mlps_removed
    return max(1.0, grade - {"fp16": 0, "awq": 0.15, "bitsandbytes": 0.3}.get(row.method, 1.0))


def items(test=39, heldout=20):
    names = dialogue.diseases()
    rows = [
        {"id": f"{split}-{i}", "split": split, "disease": names[i % len(names)], "group": f"{split}-{i}", "row": i,
         "facts": json.dumps(FACTS), "source": "synthetic"}
        for split, count in (("test", test), ("heldout", heldout))
        for i in range(count)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def answers(table, pictures, *, grade=level, words=None):
    """Judged answers: half of a good answer is the reference, a runaway one repeats itself."""
    rows = []
    for row in table.itertuples():
        rng = np.random.default_rng(int(hashlib.sha256(row.variant.encode()).hexdigest()[:8], 16))
        for item in pictures.itertuples():
            for kind in dialogue.QUESTIONS:
                score = int(np.clip(round(rng.normal(grade(row), 0.8)), 1, 4))
                right = dialogue.reference(item.disease, FACTS, kind)
                stopped = row.blocks_removed < 10
                said = words or (
                    right[: len(right) * score // 4] + ("" if stopped else " the the the" * 9)
                )
                rows.append(
                    {"variant": row.variant, "item": item.id, "split": item.split, "disease": item.disease,
                     "question": kind, "prompt": dialogue.question(kind), "answer": said, "reference": right,
                     "tokens": 12 if stopped else 60, "stopped": stopped, "judge": "rubric", "score": score,
                     "why": "fabricated"}
                )  # fmt: skip
    return pd.DataFrame(rows)


def memory(table, blocks=BLOCKS):
    """Planned sizes: the fine arithmetic is memory.py's; here only something monotone."""
    gone = table.blocks_removed + table.attentions_removed / 3 + table.mlps_removed * 2 / 3
    share, seven = 1 - gone / blocks, gone * 32 / blocks
    bytes_7b = 13.16 - 0.377 * seven
    return pd.DataFrame(
        {"variant": table.variant, "params_b": 0.0001 + 0.0016 * share,
         "vram_gib": 0.0034 * share * table.bits / 16, "peak_gib": 0.005 * share * table.bits / 16,
         "blocks_removed_7b": table.blocks_removed * 32 // blocks, "params_b_7b": 7.063427072 - 0.20238336 * seven,
         "vram_gib_7b": np.where(table.bits == 4, bytes_7b * 0.33, bytes_7b), "peak_gib_7b": bytes_7b * 1.08}
    )  # fmt: skip


def latency(table, batch=1):
    ms = (10 - 0.2 * table.blocks_removed) * (1 + 0.1 * (batch - 1))
    spread = {
        f"{name}_{end}": ms * f
        for name in ("decode_ms_per_token",)
        for end, f in (("lo", 0.9), ("hi", 1.1))
    }
    return pd.DataFrame(
        {"variant": table.variant, "prefill_ms": 4 * ms, "decode_ms_per_token": ms, "total_ms_per_token": ms * 1.2,
         "weights_gib": 0.003, "rss_gib": 0.9, "rss_peak_gib": 1.1, **spread, "batch": batch, "prompt_tokens": 53,
         "new_tokens": 12, "repeats": 5, "read_mib": 6.0, "bandwidth_gb_s": 12.0, "floor_ms": ms / 4,
         "times_floor": 4.0}
    )  # fmt: skip


def rankings(rng, *, full, protected=(0, 1, 31), pictures=14):
    """Stage 03's values, scores and plans: a planted order of blocks, seen with noise that averages out."""
    truth, frames, plans = rng.uniform(0, 0.6, BLOCKS), [], {}
    kinds = {"output_similarity": 0.1, "magnitude": None, "random-0": None}
    kinds |= {name: noise for name, noise in FULL.items() if full}
    for name, noise in kinds.items():
        part = SUBLAYERS.get(name, "block")
        known = (
            rng.uniform(0, 0.6, BLOCKS) if noise is None else truth + rng.normal(0, noise, BLOCKS)
        )
        seen = {"": known} if noise is None else {
            f"train-{i}": known + rng.normal(0, 0.2, BLOCKS) for i in range(pictures)
        }  # fmt: skip
        unit = [str(b) if part == "block" else f"{b}.{part}" for b in range(BLOCKS)]
        frames += [
            pd.DataFrame({"ranking": name, "unit": unit, "block": range(BLOCKS), "part": part, "item": item,
                          "value": value})
            for item, value in seen.items()
        ]  # fmt: skip
        means = np.mean(list(seen.values()), 0)
        order = [b for b in np.argsort(means).tolist() if b not in protected]
        plans[name] = {
            "order": [unit[b] if part != "block" else b for b in order],
            "protected": list(protected),
        }
    values = pd.concat(frames, ignore_index=True)
    groups = values.rename(columns={"ranking": "criterion"}).groupby(
        ["criterion", "block", "part"], sort=False
    )
    scores = groups.value.mean().rename("score").reset_index()
    free = scores[~scores.block.isin(protected)]
    scores["rank"] = free.groupby("criterion").score.rank(method="first") - 1
    if full:
        order = plans["output_similarity"]["order"]
        plans["output_similarity-iterative"] = {
            "order": order[:3] + order[:2:-1],
            "protected": list(protected),
        }
        plans["taylor-unprotected"] = {
            "order": [1, *plans["taylor"]["order"], 0, 31],
            "protected": [],
        }
        plans["published"] = {
            "order": [23, 4, 18, 22, 21, 24, 17, 27, 20, 26, 19, 29, 28, 5],
            "protected": [0, 1, 31],
        }
        runs = {
            "order": [],
            "protected": list(protected),
            "starts": [12, 12, 11, 11, 11, 10, 9, 9, 9, 8, 7, 7],
        }
        runs["starts"] += [7, 6, 6, 5]
        plans |= dict.fromkeys(("block_influence-contiguous", "angular-contiguous"), runs)
    return (
        values,
        scores,
        {name: plan | {"blocks": BLOCKS, "fingerprint": "f" * 64} for name, plan in plans.items()},
    )


def activation_frames(rng):
    value = np.abs(rng.normal(0, 1, (24, 64)))
    value[:, [7, 40]] *= 12
    grid = [(t, c, value[t, c]) for t in range(24) for c in range(64)]
    surface = pd.DataFrame(grid, columns=["token", "channel", "value"]).assign(
        variant="original", block=30, projection="q_proj"
    )
    rows = [
        {"variant": name, "block": b, "projection": p, "mean_abs": 1.0, "p99": 3.0, "max": 4.0 + b,
         "kurtosis": 5.0, "outlier_channels": b // 8}
        for name, kept in (("original", BLOCKS), ("pruned-6", 26), ("pruned-6+sft", 26))
        for b in range(kept) for p in ("q_proj", "v_proj")
    ]  # fmt: skip
    return pd.DataFrame(rows), surface


def stage_files(*, grade=level, words=None, heldout=20, full=False):
    """{stage: {file: frame or JSON value}} of the whole study; `full`: with all rival rankings and plans."""
    rng, table, pictures = np.random.default_rng(0), variants(), items(heldout=heldout)
    table = pd.concat([table, rival_variants(), seeds()], ignore_index=True) if full else table
    test = pictures[pictures.split == "test"]
    kinds = {
        "02_finetune": table.variant == "original",
        "04_pruning": ~table.healed & (table.method == "fp16"),
        "05_sft": table.healed & (table.method == "fp16"),
        "07_quantization": table.method != "fp16",
    }
    shown = table[table.variant.str.contains("original|pruned-6") & (table.criterion != "random-0")]
    curve = pd.DataFrame({"step": range(40), "loss": 3 / (1 + np.arange(40))})
    values, scores, plans = rankings(rng, full=full)
    statistics, surface = activation_frames(rng)
    trained = pd.DataFrame(
        {"variant": ["original+sft", "pruned-6+sft", "pruned-9+sft"], "seconds": [61.0, 50.5, 44.25],
         "train_peak_gib": [1.1, 1.0, 0.9]}
    )  # fmt: skip
    blind = pd.DataFrame([variant("blank"), variant("shuffled")])
    eight = [
        answers(shown, pictures, grade=grade, words=words),
        answers(blind, pictures, grade=lambda row: 1.3),
    ]
    files = {name: {} for name in UPSTREAM}
    for name, chosen in kinds.items():
        files[name]["answers"] = answers(table[chosen], test, grade=grade, words=words)
        files[name]["variants"] = table[chosen]
    files["01_data"] |= {"items": pictures, "report.json": NOTED}
    files["02_finetune"]["curve"] = curve
    drafts = {"block": [2, 3], "item": "train-0", "question": "name", "answer": words or "a rash", "accepted": [7, 8],
              "tokens": [10, 10], "near_ties": [0, 2], "similarity": [0.5, 1.0]}  # fmt: skip
    files["03_layer_importance"] |= {"values": values, "scores": scores, "plans.json": plans}
    files["03_layer_importance"]["similarity"] = pd.DataFrame(drafts)
    files["04_pruning"]["choice.json"] = {
        "criterion": "output_similarity",
        "operating": OPERATING,
        "deeper": DEEPER,
        "why": "a third is gone",
    }
    files["05_sft"] |= {
        "curves": curve.assign(variant="pruned-6+sft"),
        "measured/training": trained,
    }
    files["06_activation_analysis"] |= {"statistics": statistics, "figure4": surface}
    files["07_quantization"]["errors"] = pd.DataFrame(
        {
            "variant": ["original|awq4", "original|rtn4"],
            "block": [0, 0],
            "relative_error": [0.01, 0.04],
        }
    )
    four = [(name, b, group, alpha) for name in ("original", "pruned-6", "pruned-6+sft") for b in range(8)
            for group, alpha in (("qkv", b / 20), ("o", 0.0), ("gate_up", 0.4), ("down", 0.1))]  # fmt: skip
    searched = pd.DataFrame(four, columns=["variant", "block", "group", "alpha"])
    files["07_quantization"]["search"] = searched.assign(form="awq4", loss=0.01, loss_rtn=0.02)
    loud = [
        (b, "qkv", c, 20.0 if c == 3 else 1.0 + c / 64, 2.0 if c == 3 else 1.0)
        for b in range(4)
        for c in range(64)
    ]
    loud = pd.DataFrame(loud, columns=["block", "group", "channel", "peak", "scale"])
    files["07_quantization"]["channels"] = loud.assign(variant="original")
    equal = pd.DataFrame(
        {"budget": 4, "source": ["original", "pruned-6"], "form": "awq4", "quantizer": "awq"}
    )
    files["07_quantization"]["equal_bytes"] = equal.assign(step="{}")
    asked = [
        Item(name, "test", name, name, row, {}, "") for row, name in enumerate(dialogue.diseases())
    ]
    files["08_evaluation"] |= {
        "variants": table, "answers": pd.concat(eight), "memory": memory(table),
        "measured/latency": pd.concat([latency(shown), latency(shown, 4)]),
        "judge_controls": controls.judge_controls(asked, judge.RubricJudge()),
    }  # fmt: skip
    earlier = {name: files[name]["answers"] for name in kinds}
    together = secondary.predictions(earlier, files["08_evaluation"]["answers"])
    files["08_evaluation"]["predictions"] = together.assign(similarity=together.score / 4)
    return files


def finished(**how):
    """The Results of a finished study, without files; how: of stage_files."""
    files, given = stage_files(**how), {}
    for field in dataclasses.fields(Results):
        stage, _, name = field.metadata.get("file", "08_evaluation/variants").partition("/")
        given[field.name] = files[stage].get(name.removesuffix(".parquet"))
    given["variants"] = files["08_evaluation"]["variants"]
    return load_results({}, **{name: value for name, value in given.items() if name != "answers"})


def write_store(root, files):
    """Artifact folders under root/artifacts/store; returns {stage: folder}."""
    folders = {}
    for stage, content in files.items():
        folder = (
            root / "artifacts" / "store" / stage / hashlib.sha256(stage.encode()).hexdigest()
        )
        for name, value in content.items():
            path = folder / (name if name.endswith(".json") else f"{name}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value)) if name.endswith(".json") else value.to_parquet(path)
        folder.mkdir(parents=True, exist_ok=True)
        folders[stage] = folder
    return folders


def notebook(stage, root):
    """An executed notebook with everything a report must survive."""
    code = nbformat.v4.new_code_cell("print(1)", execution_count=1)
    shown = [
        {"text/html": f"<style>td {{}}</style><table><tr><td>{EVIL}</td></tr></table>"},
        {"text/markdown": f"**{EVIL}** <iframe src='https://x.test'></iframe>"},
        {"application/javascript": "alert(2)", "text/plain": "js"},
        {"image/png": "iVBORw0KGgo="},
    ]
    code.outputs = [
        nbformat.v4.new_output("stream", text=f"read {root}/artifacts/x\n{EVIL}\n"),
        *(nbformat.v4.new_output("display_data", data=data) for data in shown),
        nbformat.v4.new_output(
            "error", ename="E", evalue="x", traceback=[f'File "{root}/derm_compress/x.py"']
        ),
    ]
    setup = nbformat.v4.new_code_cell("import runpy", metadata={"tags": ["setup"]})
    asked = nbformat.v4.new_code_cell(f"seed: int = 0  # {EVIL}", metadata={"tags": ["parameters"]})
    text = f"# {stage[:2]} A question?\n\nEq. 1 is $\\Delta=\\max(|w|)/2^{{N-1}}$ and\n\n"
    text += "$$\\bar c_l=\\frac1N\\sum_i c_i$$\n\nIt costs 5 \\$."
    said = nbformat.v4.new_markdown_cell(text)
    return nbformat.v4.new_notebook(cells=[said, setup, asked, code])


def write_run(root, run="tiny", *, files=None, stages=None, notebooks=True):
    """A whole run below `root`: store, pointers, run_info.json and executed notebooks."""
    files = files or stage_files()
    folders = write_store(root, {name: files[name] for name in stages or files})
    home = root / "artifacts" / "runs" / run
    (home / "notebooks").mkdir(parents=True, exist_ok=True)
    for stage, folder in folders.items():
        pointer = {
            "stage": stage, "key": folder.name, "seconds": 12.5, "cached": stage == "01_data",
            "parameters": {"run": run, "seed": 0, "note": EVIL}, "environment": {"python": "3.11.2", "cpu": "2 cores"},
            "upstream": {name: folders[name].name for name in UPSTREAM[stage] if name in folders},
            "git": {"commit": "0123456789abcdef", "dirty": True},
        }  # fmt: skip
        (home / f"{stage}.json").write_text(json.dumps(pointer))
        if notebooks:
            nbformat.write(notebook(stage, root), home / "notebooks" / f"{stage}.ipynb")
    info = {"run": run, "seconds": 321.5, "status": "complete", "parameters": {"blocks": 6}}
    (home / "run_info.json").write_text(json.dumps(info))
    return folders
