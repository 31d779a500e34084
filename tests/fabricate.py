"""A made-up finished run, file by file as the stages leave them, for the tests of the report."""

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
from derm_compress.method.pruning.controls import removal_controls
from derm_compress.method.pruning.plan import Plan
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import Variant
from derm_compress.report.results import Results, load_results

BLOCKS, DEPTHS, OPERATING, DEEPER = 32, (0, 2, 4, 6, 7, 8, 9, 10, 12), 6, 9
DEEP = (14, 16)  # of a full study; the published plan has 14 blocks
SUBLAYERS = {"output_similarity-attention": "attention", "output_similarity-mlp": "mlp"}
# Rivals of a full study, and how much worse than its own criterion they are made.
PLANS = {"output_similarity-iterative": -0.1, "output_similarity-text": 0.05, "perplexity": -0.3}
PLANS |= {"perplexity-text": -0.1, "block_influence": 0.1, "block_influence-contiguous": 0.2}
PLANS |= {"angular": 0.1, "angular-contiguous": 0.25, "taylor": 0.3, "taylor-unprotected": 0.9}
PLANS |= {"magnitude": 0.2, "last": 0.7, "published": 0.6}
# Rankings beside the three small ones: their noise around the planted order; None: no data.
FULL = {"output_similarity-text": 0.15, "perplexity": 0.05, "perplexity-text": 0.3}
FULL |= {"block_influence": 0.2, "block_influence-text": 0.1, "angular": 0.2, "angular-text": 0.2}
FULL |= {"taylor": 0.5, "taylor-text": 0.6, **dict.fromkeys(f"random-{i}" for i in (1, 2, 3, 4))}
FULL |= {"last": None, **dict.fromkeys(SUBLAYERS, 0.1)}
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
UNASKED = {"extra_allocation", "allocation_map"}  # parts of stage 09, which is off by default
EVIL = (
    "<script>top.planted=parent.planted=1</script><img src=x onerror=alert(1)> $\\frac{1}{2$ </s>"
)
NOTED = {"source": "synthetic", "counts": {"train": {"rosacea": 1737}}, "notes": []}
NOTED |= {"groups": 9, "largest_group": 2, "excluded": {"NEV": 3}}
NOTED |= {"unreadable": [{"image": EVIL, "reason": "truncated"}]}
FACTS = {"count": "few", "size": "small", "colour": "red"}
FACTS |= {"border": "sharp", "surface": "scaly", "site": "face"}


def variant(name, blocks_removed=0, **known):
    made = Variant(name, name, blocks_removed, group_size=64, recipe='{"base": "tiny"}', **known)
    return dataclasses.asdict(made)


def quantized(row, method, bits=4):
    name = f"{row['variant']}|{method}{bits}"
    return row | {"variant": name, "method": method, "bits": bits, "quantizer": method}


def variants():
    """Every variant of the study as one frame."""
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
        variant("pruned-6-shuffled+sft", 6, criterion="shuffled", healed=True),
    ]
    packed = [
        quantized(row, method)
        for row in (pruned[0], pruned[3], healed[1], healed[2], healed[3])
        for method in ("awq", "bitsandbytes", "rtn", "rtn_symmetric")
    ]
    return pd.DataFrame(pruned + magnitude + healed + packed)


def rival_variants():
    """Every other plan of a full study, before SFT; the published one has fewer depths."""
    rows = [variant(f"pruned-{n}", n, criterion="output_similarity") for n in DEEP]
    deep = {"published": DEEP[:1], **dict.fromkeys(SUBLAYERS, ())}
    for name in [*PLANS, "random-0", "random-1", "random-2", *SUBLAYERS]:
        removed = f"{SUBLAYERS.get(name, 'block')}s_removed"
        for n in (2, 4, 6, 8, 9, 10, 12, *deep.get(name, DEEP)):
            if name != "magnitude" or n not in (OPERATING, DEEPER):
                rows.append(variant(f"pruned-{n}-{name}", criterion=name, **{removed: n}))
    return pd.DataFrame(rows)


def seeds():
    """Two further trainings of the healed model and its control."""
    rows = [
        variant(f"{name}+sft~{i}", n, criterion=criterion, healed=True, sft_seed=i)
        for name, n, criterion in (("original", 0, ""), ("pruned-6", 6, "output_similarity"))
        for i in (1, 2)
    ]
    return pd.DataFrame(rows)


def level(row):
    """The mean grade of a variant's answers: a plateau, a cliff, healing, a price for four bits."""
    others = {"shuffled": 1.5}
    worse = (PLANS | others).get(row.criterion, 0.3 if "random" in row.criterion else 0.0)
    grade = 3.4 - 0.13 * row.blocks_removed - worse
    grade += 0.1 * row.blocks_removed if row.healed else 0.0
    grade -= 0.05 * row.attentions_removed + 0.1 * row.mlps_removed
    return max(1.0, grade - {"fp16": 0, "awq": 0.15, "bitsandbytes": 0.3}.get(row.method, 1.0))


def items(test=39, heldout=20):
    names = dialogue.diseases()
    rows = [
        {
            "id": f"{split}-{i}",
            "split": split,
            "disease": names[i % len(names)],
            "group": f"{split}-{i}",
            "row": i,
            "facts": json.dumps(FACTS),
            "source": "synthetic",
        }
        for split, count in (("test", test), ("heldout", heldout))
        for i in range(count)
    ]
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
                said = right[: len(right) * score // 4] + ("" if stopped else " the the the" * 9)
                rows.append(
                    {
                        "variant": row.variant,
                        "item": item.id,
                        "split": item.split,
                        "disease": item.disease,
                        "question": kind,
                        "prompt": dialogue.question(kind),
                        "answer": words or said,
                        "reference": right,
                        "tokens": 12 if stopped else 60,
                        "stopped": stopped,
                        "judge": "rubric",
                        "score": score,
                        "why": "fabricated",
                    }
                )
    return pd.DataFrame(rows)


def memory(table, blocks=BLOCKS):
    """Planned sizes: the fine arithmetic is memory.py's; here only something monotone."""
    gone = table.blocks_removed + table.attentions_removed / 3 + table.mlps_removed * 2 / 3
    share, seven = 1 - gone / blocks, gone * 32 / blocks
    bytes_7b = 13.16 - 0.377 * seven
    return pd.DataFrame(
        {
            "variant": table.variant,
            "params_b": 0.0001 + 0.0016 * share,
            "vram_gib": 0.0034 * share * table.bits / 16,
            "peak_gib": 0.005 * share * table.bits / 16,
            "blocks_removed_7b": table.blocks_removed * 32 // blocks,
            "params_b_7b": 7.063427072 - 0.20238336 * seven,
            "vram_gib_7b": np.where(table.bits == 4, bytes_7b * 0.33, bytes_7b),
            "peak_gib_7b": bytes_7b * 1.08,
        }
    )


def latency(table, batch=1):
    ms = (10 - 0.2 * table.blocks_removed) * (1 + 0.1 * (batch - 1))
    spread = {"decode_ms_per_token_lo": 0.9 * ms, "decode_ms_per_token_hi": 1.1 * ms}
    return pd.DataFrame(
        {
            "variant": table.variant,
            "prefill_ms": 4 * ms,
            "decode_ms_per_token": ms,
            "total_ms_per_token": ms * 1.2,
            "weights_gib": 0.003,
            "rss_gib": 0.9,
            "rss_peak_gib": 1.1,
            **spread,
            "batch": batch,
            "prompt_tokens": 53,
            "new_tokens": 12,
            "repeats": 5,
            "read_mib": 6.0,
            "bandwidth_gb_s": 12.0,
            "floor_ms": ms / 4,
            "times_floor": 4.0,
        }
    )


def rankings(rng, *, full, protected=(0, 1, 31), pictures=14):
    """Stage 03's values, scores and plans: a planted order of blocks, seen with noise."""
    truth, frames, plans = rng.uniform(0, 0.6, BLOCKS), [], {}
    kinds = {"output_similarity": 0.1, "magnitude": None, "random-0": None}
    kinds |= {name: noise for name, noise in FULL.items() if full}
    for name, noise in kinds.items():
        part = SUBLAYERS.get(name, "block")
        known = (
            rng.uniform(0, 0.6, BLOCKS) if noise is None else truth + rng.normal(0, noise, BLOCKS)
        )
        seen = (
            {"": known}
            if noise is None
            else {f"train-{i}": known + rng.normal(0, 0.2, BLOCKS) for i in range(pictures)}
        )
        unit = [str(b) if part == "block" else f"{b}.{part}" for b in range(BLOCKS)]
        frames += [
            pd.DataFrame(
                {
                    "ranking": name,
                    "unit": unit,
                    "block": range(BLOCKS),
                    "part": part,
                    "item": item,
                    "value": value,
                }
            )
            for item, value in seen.items()
        ]
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
        free, fixed = {"protected": []}, {"protected": list(protected)}
        unprotected = [1, *plans["taylor"]["order"], 0, 31]
        published = [23, 4, 18, 22, 21, 24, 17, 27, 20, 26, 19, 29, 28, 5]
        starts = [12, 12, 11, 11, 11, 10, 9, 9, 9, 8, 7, 7, 7, 6, 6, 5]
        plans["output_similarity-iterative"] = {"order": order[:3] + order[:2:-1], **fixed}
        plans["taylor-unprotected"] = {"order": unprotected, **free}
        plans["published"] = {"order": published, **fixed}
        for name in ("block_influence-contiguous", "angular-contiguous"):
            plans[name] = {"order": [], "starts": starts, **fixed}
    told = {"blocks": BLOCKS, "fingerprint": "f" * 64}
    return values, scores, {name: plan | told for name, plan in plans.items()}


def activation_frames(rng):
    value = np.abs(rng.normal(0, 1, (24, 64)))
    value[:, [7, 40]] *= 12
    grid = [(t, c, value[t, c]) for t in range(24) for c in range(64)]
    surface = pd.DataFrame(grid, columns=["token", "channel", "value"]).assign(
        variant="original", block=30, projection="q_proj"
    )
    rows = [
        {
            "variant": name,
            "block": b,
            "projection": p,
            "mean_abs": 1.0,
            "p99": 3.0,
            "max": 4.0 + b,
            "kurtosis": 5.0,
            "outlier_channels": b // 8,
        }
        for name, kept in (("original", BLOCKS), ("pruned-6", 26), ("pruned-6+sft", 26))
        for b in range(kept)
        for p in ("q_proj", "v_proj")
    ]
    return pd.DataFrame(rows), surface


def control_frames(pictures):
    """What stages 04, 06 and 07 leave of a specimen whose controls hold."""
    plan = Plan("output_similarity", tuple(range(2, 31)), (0, 1, 31), BLOCKS)
    run = Plan("angular-contiguous", (), (0, 1, 31), BLOCKS, starts=tuple([2] * 29))
    removals = removal_controls(Recipe("tiny", "f" * 64, BLOCKS), plan, run)
    marks = {"whole": 3.4, "protected": 1.2}
    fatal = removals.control.isin(marks)
    grades = dict(zip(removals.variant, removals.control.map(marks), strict=True))
    told = answers(removals[fatal], pictures, grade=lambda row: grades[row.variant])
    lost = {"chosen": 0.6, "run": 0.7, "random": 2.0}
    lost_by_picture = [
        (row.variant, row.method, f"train-{i}", "name", lost[row.control] + i / 100)
        for row in removals[~fatal].itertuples()
        for i in range(6)
    ]
    inputs = [
        ("original", b, p, 64, b % 2, 9.0) for b in range(BLOCKS) for p in ("q_proj", "k_proj")
    ]
    columns = ["variant", "block", "projection", "channels", "outlier_channels", "loudest"]
    losses = [
        (f"original|{method}3", method, f"train-{i}", "name", loss + i / 100)
        for method, loss in (("awq", 0.5), ("rtn", 0.8))
        for i in range(6)
    ]
    told_loss = ["variant", "method", "item", "question", "loss"]
    rounded = [
        (weights, bits, error)
        for weights in ("as they are", "with noise", "normal")
        for bits, error in ((4, 0.094), (3, 0.202), (2, 0.467))
    ]
    return (
        {
            "controls": removals,
            "control_answers": told,
            "control_losses": pd.DataFrame(lost_by_picture, columns=told_loss),
        },
        {"inputs": pd.DataFrame(inputs, columns=columns)},
        {
            "control_losses": pd.DataFrame(losses, columns=told_loss),
            "rounded_anew": pd.DataFrame(rounded, columns=["weights", "bits", "relative_error"]),
        },
    )


def stage_files(*, grade=level, words=None, heldout=20, full=False):
    """{stage: {file: frame or JSON value}} of the whole study; `full`: with all rival rankings."""
    rng, table, pictures = np.random.default_rng(0), variants(), items(heldout=heldout)
    table = pd.concat([table, rival_variants(), seeds()], ignore_index=True) if full else table
    test = pictures[pictures.split == "test"]
    kinds = {
        "02_finetune": table.variant == "original",
        "04_pruning": ~table.healed & (table.method == "fp16"),
        "05_sft": table.healed & (table.method == "fp16"),
        "07_quantization": table.method != "fp16",
    }
    asked = table.variant.str.contains("original|pruned-6")
    shown = table[asked & ~table.criterion.isin(["random-0", "shuffled"])]
    values, scores, plans = rankings(rng, full=full)
    statistics, surface = activation_frames(rng)
    trained = pd.DataFrame(
        {
            "variant": ["original+sft", "pruned-6+sft", "pruned-9+sft"],
            "seconds": [61.0, 50.5, 44.25],
            "train_peak_gib": [1.1, 1.0, 0.9],
        }
    )
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
    ablations = values[(values.ranking == "output_similarity") & (values["item"] != "")]
    files["03_layer_importance"]["measured"] = ablations.assign(
        question="features",
        answer=[f"Without block {b} {words or ''}" for b in ablations.block],
        original="A few red spots.",
    )
    files["03_layer_importance"] |= {"values": values, "scores": scores, "plans.json": plans}
    files["04_pruning"]["choice.json"] = {
        "criterion": "output_similarity",
        "operating": OPERATING,
        "deeper": DEEPER,
        "why": "a third is gone",
    }
    for stage, found in zip(("04", "06", "07"), control_frames(test), strict=True):
        files[next(name for name in files if name.startswith(stage))] |= found
    files["05_sft"]["measured/training"] = trained
    files["06_activation_analysis"] |= {"statistics": statistics, "figure4": surface}
    files["07_quantization"]["errors"] = pd.DataFrame(
        {
            "variant": ["original|awq4", "original|rtn4"],
            "block": [0, 0],
            "relative_error": [0.01, 0.04],
        }
    )
    four = [
        (name, b, group, alpha)
        for name in ("original", "pruned-6", "pruned-6+sft")
        for b in range(8)
        for group, alpha in (("qkv", b / 20), ("o", 0.0), ("gate_up", 0.4), ("down", 0.1))
    ]
    searched = pd.DataFrame(four, columns=["variant", "block", "group", "alpha"])
    files["07_quantization"]["search"] = searched.assign(form="awq4", loss=0.01, loss_rtn=0.02)
    equal = pd.DataFrame(
        {"budget": 4, "source": ["original", "pruned-6"], "form": "awq4", "quantizer": "awq"}
    )
    files["07_quantization"]["equal_bytes"] = equal.assign(step="{}")
    asked = [
        Item(name, "test", name, name, row, {}, "") for row, name in enumerate(dialogue.diseases())
    ]
    files["08_evaluation"] |= {
        "variants": table,
        "answers": pd.concat(eight),
        "memory": memory(table),
        "measured/latency": pd.concat([latency(shown), latency(shown, 4)]),
        "judge_controls": controls.judge_controls(asked, judge.RubricJudge()),
    }
    earlier = {name: files[name]["answers"] for name in kinds}
    together = secondary.predictions(earlier, files["08_evaluation"]["answers"])
    files["08_evaluation"]["predictions"] = together.assign(similarity=together.score / 4)
    return files


def finished(**how):
    """The Results of a finished study, without files; how: of stage_files."""
    files, given = stage_files(**how), {}
    for field in dataclasses.fields(Results):
        stage, _, name = field.metadata.get("file", "08_evaluation/variants").partition("/")
        given[field.name] = files.get(stage, {}).get(name.removesuffix(".parquet"))
    given["variants"] = files["08_evaluation"]["variants"]
    return load_results({}, **{name: value for name, value in given.items() if name != "answers"})


def write_store(root, files):
    """Artifact folders under root/artifacts/store; returns {stage: folder}."""
    folders = {}
    for stage, content in files.items():
        folder = root / "artifacts" / "store" / stage / hashlib.sha256(stage.encode()).hexdigest()
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
            "stage": stage,
            "key": folder.name,
            "seconds": 12.5,
            "cached": stage == "01_data",
            "parameters": {"run": run, "seed": 0, "note": EVIL},
            "environment": {"python": "3.11.2", "cpu": "2 cores"},
            "upstream": {name: folders[name].name for name in UPSTREAM[stage] if name in folders},
            "git": {"commit": "0123456789abcdef", "dirty": True},
        }
        (home / f"{stage}.json").write_text(json.dumps(pointer))
        if notebooks:
            nbformat.write(notebook(stage, root), home / "notebooks" / f"{stage}.ipynb")
    info = {"run": run, "seconds": 321.5, "status": "complete", "parameters": {"blocks": 6}}
    (home / "run_info.json").write_text(json.dumps(info))
    return folders
