"""Model cards of exported folders: what the model is, what it is for, whose data it saw, how it opens. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.evaluate import metrics
from derm_compress.model.recipe import Recipe

NOT_PLAIN = (
    "plain Transformers cannot open this folder, as blocks lack their attention or MLP: "
    "use derm_compress.model.loading.load_base(folder)"
)
HALF = "- what is not quantized is in half precision (float16); the run's scores are of single precision on a CPU"
ASKING = (
    "from PIL import Image",
    f'asked = "USER: <image>\\n{dialogue.question("name")} ASSISTANT:"',
    'inputs = processor(text=asked, images=Image.open("picture.jpg").convert("RGB"), return_tensors="pt")',
    "inputs = inputs.to(model.device, model.dtype)",
    "print(processor.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))",
)
WEIGHTS = {  # licence of a base, by its name: the tag that the hub knows, and what it says
    "tiny": (
        "apache-2.0",
        "The base is the tiny model of derm_compress, under Apache-2.0 like its code.",
    ),
    "pico": ("apache-2.0", "The base has random weights; nobody's licence binds them."),
    "llava-1.5-7b-hf": (
        "llama2",
        "The base is LLaVA-1.5-7B; the Llama 2 Community License binds its derivatives.",
    ),
}
UNKNOWN = (
    "other",
    "The base's own licence binds this model too; look it up where the base comes from.",
)
DATA = {  # by what stage 01 calls its source
    "synthetic": "Pictures drawn by derm_compress, no photographs; free like its code (Apache-2.0).",
    "pad-ufes-20": "PAD-UFES-20 photographs (CC BY 4.0; Pacheco et al. 2020): name the source.",
    "dermnet": "DermNet photographs: copyrighted, for non-commercial use, and no part of this folder; their terms "
    "bind what is trained on them.",
    "folder": "A folder of the maker's own: the maker must know its licence.",
}


@dataclass(frozen=True)
class Facts:
    """What a run knows of a model beside its recipe; empty where the run has not come so far."""

    run: str = ""
    variant: str = ""
    source: str = ""
    judge: str = "rubric"
    score: metrics.Score | None = None


def facts(recipe_json: str, artifacts: Path, run: str) -> Facts:
    """The run's name for the model, its data and its score on test and held-out items, as far as they are stored."""
    report, frame = _stored(artifacts, run, "01_data", "report.json"), None
    if table := _stored(artifacts, run, "08_evaluation", "variants.parquet"):
        frame = pd.read_parquet(table)
    names = [] if frame is None else frame.variant[frame.recipe == recipe_json].tolist()
    answers = _stored(artifacts, run, "08_evaluation", "answers.parquet")
    source = json.loads(report.read_text("utf-8")).get("source", "") if report else ""
    if not names or not answers:
        return Facts(run, source=source)
    told = pd.read_parquet(answers, filters=[("variant", "==", names[0])])
    score, judge = (
        metrics.score_interval(told),
        told["judge"].iloc[0] if "judge" in told and len(told) else "rubric",
    )
    return Facts(run, names[0], source, str(judge), score if score.n else None)


def _stored(artifacts, run, stage, name):
    """A finished stage's file, or None."""
    pointer = Path(artifacts, "runs", run, f"{stage}.json")
    if not pointer.is_file():
        return None
    path = Path(artifacts, "store", stage, json.loads(pointer.read_text("utf-8"))["key"], name)
    return path if path.is_file() else None


def model_card(
    recipe: Recipe, left: int, packed: bool = False, known: Facts = Facts(), half: bool = False  # noqa: B008 (frozen)
) -> str:  # fmt: skip
    """README.md of an exported folder, from its recipe and what the run knows; `left`: decoder blocks."""
    base = Path(recipe.base).name
    tag, licence = WEIGHTS.get(base, UNKNOWN)
    data = DATA.get(known.source, "The export does not know the data: see the run's stage 01.")
    sections = {
        "How it was made": "\n".join(made(recipe, packed) + [HALF] * half),
        "Intended use": "Research on compressing multimodal models: what pruning, healing and quantizing cost. It "
        "answers three questions about a skin picture: name, treatment and clinical feature.",
        "Not a medical device": "Not for diagnosis, triage or treatment, nor for advice to anyone. Nobody has tested "
        "it on patients.",
        "Limits": limits(known),
        "Data and licences": f"{data}\n\n{licence}",
        "How to load": opened_by(recipe, packed),
    }
    head = (
        f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: {tag}\n---\n"
    )
    title = f"# A variant of {base} with {left} of {recipe.blocks} decoder blocks\n"
    return "\n".join([head, title, *(f"## {name}\n\n{text}\n" for name, text in sections.items())])


def made(recipe: Recipe, packed: bool) -> list[str]:
    """The recipe's steps, a line each."""
    said = [f"- base: {Path(recipe.base).name}, fingerprint {recipe.fingerprint[:12]}"]
    for step in recipe.steps:
        if step["step"] == "prune":
            without = f", without {', '.join(step['absent'])}" if step.get("absent") else ""
            said.append(f"- pruned to the decoder blocks {list(step['kept'])} of the base{without}")
        elif step["step"] == "adapter":
            said.append("- fine-tuned with QLoRA, the adapter merged into the unquantized weights")
        else:
            holds = "packed codes: see quantization_config in config.json"
            holds = (
                holds if packed else "dequantized weights: the same answers, no smaller in memory"
            )
            form = f"{step['method']}, {step['bits']} bits in groups of {step['group_size']}"
            said.append(f"- {form}; this folder holds the {holds}")
    return said


def limits(known: Facts) -> str:
    """What its score is, and what no score shows."""
    said = f"Scores are marks of a judging model, {known.judge}. "
    if known.judge == "rubric":
        said = "The judge counts stated facts; it sees neither safety nor tone. "
    said += "Answers can be wrong and sound sure. "
    said += "Eight diseases are known, and every picture is answered as one of them. Skin colours, ages and cameras "
    said += "were not evaluated apart."
    if known.score:
        s = known.score
        told = f"Run {known.run}, variant `{known.variant}`: {s.score:.1f} % (95 % interval {s.lo:.1f} to {s.hi:.1f}, "
        said = f"{told}{s.n} answers; the floor is {metrics.FLOOR:.0f} %).\n\n{said}"
    return said


def opened_by(recipe: Recipe, packed: bool) -> str:
    """The lines of code that open the folder."""
    told, needs_scales = (
        [],
        packed and recipe.steps[-1]["method"] not in ("bitsandbytes", "awq_nf4"),
    )
    if recipe.absent():
        told = [f"{NOT_PLAIN[0].upper()}{NOT_PLAIN[1:]}\n"]
        lines = (
            "from derm_compress.model import loading",
            'model, processor = loading.load_base("this-folder")',
        )
    elif needs_scales:
        lines = (
            "from derm_compress.method.quantization import checkpoint",
            'model, processor = checkpoint.load("this-folder")',
        )
    else:
        lines = (
            "from transformers import AutoProcessor, LlavaForConditionalGeneration",
            'model = LlavaForConditionalGeneration.from_pretrained("this-folder")',
            'processor = AutoProcessor.from_pretrained("this-folder")',
        )
    lines = (*lines, *ASKING)
    notes = packed_notes(recipe.steps[-1]) if packed and not recipe.absent() else []
    return "\n".join([*told, "```python", *lines, "```", *notes])


def packed_notes(step: dict) -> list[str]:
    """Who else may open a packed folder, and where its arithmetic is slow or another."""
    if step["method"] in ("bitsandbytes", "awq_nf4"):
        return [
            "\nOn a CPU with AVX512-BF16 plain Transformers lets bitsandbytes compute in bfloat16, so that answers may "
            "differ from the run's; `derm_compress.method.quantization.checkpoint.load` turns that off."
        ]
    one = step["bits"] == 4 and not step.get("block_bits") and step["method"] != "hqq"
    if one:
        who = "In AutoAWQ's GEMM layout: by its format vLLM and other readers of AWQ take it, which was not tried."
    else:
        who = "In this package's own layout, which derm_compress/checkpoint.py describes."
    how = "A GPU below compute capability 8.0 (a T4) has no int4 kernel: there every forward decodes the weights, which "
    return [f"\n{who} {how}saves memory and no time."] if one else [f"\n{who}"]
