"""Hours of Kaggle's runs on T4s, from what an H100 and an H200 took: the table of docs/kaggle.md.

Models, answers and steps are counted from the run files, by the study's own functions, with orders
by chance in place of rankings. A T4 is given the share of its peak that the H100 had of its own:
of fp16 products where tokens are read and learnt, of fp32 where scales are searched, of bandwidth
where tokens are written. Nothing takes less than its launches, which no peak rate scales. They were
measured before steps were recorded as graphs; a second sum doubles them, as on a slower host.
Not counted: pictures, scores and figures, which are the host's. The last line is JSON: hours.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose awq.py would stand before AutoAWQ's package
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd

from derm_compress.data.dialogue import QUESTIONS
from derm_compress.evaluate.answers import table_variants
from derm_compress.evaluate.latency import ROUNDS
from derm_compress.method.importance.rankings import rankings
from derm_compress.method.pruning.controls import removal_controls
from derm_compress.method.pruning.depths import choose_operating_point, plan_depths
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization import wanted
from derm_compress.model import shapes, variants
from derm_compress.model.memory import CONVERSATION, FP16
from derm_compress.model.recipe import Recipe
from derm_compress.study import batches
from derm_compress.study.needs import ANSWER, PROMPT
from derm_compress.study.params import known_parameters, read_notebooks, read_params
from derm_compress.study.preflight import KAGGLE, architecture

ROOT = Path(__file__).parents[1]
RUNS = {"small": (1, 1), "kaggle-t4-day": (2, 1), "kaggle-t4": (2, 2)}  # T4s, sessions
T4, H100 = (65, 8.1, 320), (989, 66.9, 3350)  # TFLOP/s of fp16 and fp32, GB/s: the makers' figures
# Measured on an H200 with `small`: s a step of 24 conversations, an answer without a block (and the
# share of tokens that drafts gave), the start of a notebook
STEP, RESULT, ACCEPTED, START = 0.68, 144 / 2160, 0.16, 18
DISK, INSTALL = 0.4e9, 600  # bytes a second, s a session: assumed
KINDS = len(QUESTIONS)
TOLD = KINDS * (PROMPT + ANSWER)  # tokens of a picture's questions and answers


class Counts:
    """What a run makes and asks; p: its parameters, arch: its model's shapes."""

    def __init__(self, p: dict, arch):
        rng, original = np.random.default_rng(0), Recipe(p["model"], "", arch.blocks)
        spared = sorted({block % arch.blocks for block in p["protected"]})
        free = sorted(set(range(arch.blocks)) - set(spared))
        plans = [
            Plan(name, tuple(map(int, rng.permutation(free))), tuple(spared), arch.blocks)
            for name in p["rankings"]
        ]
        choice = choose_operating_point(None, plans[0], p["operating_blocks"] or 6)
        chosen = {choice["operating"], choice["deeper"]}
        depths, rival = (
            sorted({*plan_depths(p[name], plans[0]), *chosen})
            for name in ("depths", "rival_depths")
        )
        self.pruned = variants.pruned(original, plans, depths, rival)
        self.own = variants.pruned(original, plans[:1], depths)
        controls = removal_controls(original, plans[0], plans[0]).control
        self.fatal = int(controls.isin(["whole", "protected"]).sum())
        how = {"depths": p["sft_depths"], "seeds": p["sft_seeds"], "rivals": p["sft_rivals"]}
        how["relearning"] = p["seed"] if p["relearning"] else None
        how["distilled"] = p["distillation"] > 0
        self.tuned = variants.to_heal(self.pruned, choice, **how)
        made = self.tuned.healed_variant
        healed = self.tuned.assign(variant=made, source=made, healed=True)
        mended = variants.mended(self.pruned, choice, "maps") if p["replace_me"] else []
        self.healed = pd.concat([healed, pd.DataFrame(mended)], ignore_index=True)
        known = pd.concat([self.pruned, self.healed], ignore_index=True)
        group = p["group_size"]
        asked = known, plans[0], p["equal_bytes"], p["bits"][1:]
        shared = wanted.equal_bytes(*asked, group_size=group)
        main, further = variants.to_quantize(known, choice)
        self.forms = wanted.wanted_forms(main, further, p["methods"], p["bits"], group, shared)
        sources = variants.named(known, self.forms.source)
        self.quantized = wanted.quantized_variants(sources, self.forms, "scales")
        self.asked = pd.concat([known, self.quantized])
        self.judged = table_variants(self.asked, choice)

    def searched(self) -> tuple[int, int]:
        """Models that scales are searched for, and searches."""
        found = [wanted.calibrations(self.forms, name) for name in self.forms.source.unique()]
        found = [forms for passes in found for forms in passes.values()]
        return len(found), sum(map(len, found))

    @property
    def loads(self) -> int:
        """One a step, one a fine-tune, and two of each model whose latency is measured."""
        steps = 2 + 1 + 5 + 1 + 3 + 4 + 3  # of 02 to 08
        return steps + 1 + len(self.tuned) + ROUNDS * len(self.judged)


@dataclass(frozen=True)
class Card:
    """Seconds on one T4 of a model of these shapes; launches: times those measured."""

    arch: shapes.Architecture
    seven_b: shapes.Architecture  # what was measured
    measured: pd.Series  # the rehearsal's, by (step, variant, quantity)
    launches: float = 1

    def share(self, size) -> float:
        """Of what 7B's blocks take, as size(out, in) of a linear counts."""
        return self.arch.over_linears(size) / self.seven_b.over_linears(size)

    def products(self, tokens: float, rate: float) -> float:
        """At `rate` tokens a second of 7B on the H100."""
        return tokens / rate * H100[0] / T4[0] * self.share(lambda out, into: out * into)

    def learnt(self, rows: int) -> float:
        """A step of so many conversations."""
        rate = self.measured["training", "NF4, 32 blocks, batch 4, checkpointing", "speed"]
        tokens = rows * (self.arch.image_tokens + CONVERSATION)
        return max(self.launches * STEP, self.products(tokens, rate))

    def read(self, pictures: int, told: float, passes: float = 1) -> float:
        """Pictures, and so many other tokens, in so many passes through all blocks."""
        milliseconds = self.measured["generate", "fp16, 32 blocks, batch 8", "prefill"]
        tokens = pictures * self.arch.image_tokens + told
        return max(passes * self.launched, self.products(tokens, 8 * 640 / milliseconds * 1e3))

    @property
    def launched(self) -> float:
        """A pass through all blocks that waits for launches alone: on the H100 4.9 floors."""
        milliseconds = self.measured["generate", "fp16, 32 blocks, batch 1", "decode"]
        return self.launches * milliseconds / 1e3 * self.arch.blocks / 32

    def written(self, rows: int) -> float:
        """A token of each of `rows` answers: weights and cache are read once."""
        copied = self.measured["limits", "large tensors", "copy on the device"] / H100[2]
        cache = rows * 2 * self.arch.cache_width * self.arch.blocks
        cache *= self.arch.image_tokens + PROMPT + ANSWER
        weights = self.arch.decoder_linears() + self.arch.vocabulary * self.arch.hidden
        return max(self.launched, FP16 * (weights + cache) / (copied * T4[2] * 1e9))

    def answered(self, models: int, pictures: int, p: dict) -> float:
        """All questions about so many pictures, each of which is read once.

        As many steps as the longest answer has, or all answers take by turns.
        """
        asked = KINDS * pictures
        rows = max(1, min(p["batch_size"], asked))
        steps = max(p["max_new_tokens"], asked * ANSWER / rows)
        read = self.read(pictures, asked * PROMPT, asked / rows)
        return models * (read + steps * self.written(rows))

    def searched(self, models: int, searches: int, pictures: int) -> float:
        """Calibrations (8 conversations a pass) and searches, in fp32."""
        found = 0.0
        sizes = {"calibration": lambda out, into: out * into, "search": lambda o, i: o * i * i}
        counts = {"calibration": models * KINDS * pictures / 8, "search": searches}
        for what, size in sizes.items():
            once = self.arch.blocks * self.measured["awq", "fp16, 2 blocks", f"{what} of a block"]
            scaled = H100[1] / T4[1] * self.share(size) * 32 / self.arch.blocks
            found += counts[what] * once * max(self.launches, scaled)
        return found


@dataclass(frozen=True)
class Run:
    """A run by its file, on so many T4, in so many sessions; methods give the seconds of PARTS."""

    p: dict
    counts: Counts
    card: Card
    cards: int
    sessions: int

    def training(self) -> float:
        """All T4 share a batch, or have fine-tunes of their own; a teacher takes as long again."""
        p, healed = self.p, len(self.counts.tuned)
        first = p["finetune_steps"] * self.card.learnt(p["finetune_batch"])
        steps = p["sft_steps"] * (healed + (p["distillation"] > 0))
        return (first + steps * self.card.learnt(p["sft_batch"])) / self.cards

    def answers(self) -> float:
        """A model over two T4 works on one at a time."""
        p, n = self.p, self.counts
        tested = 2 + len(n.pruned) + len(n.healed) + len(n.quantized)
        asked = [
            (tested, p["n_test"]),
            (len(n.own), p["n_dev"]),
            (n.fatal, min(p["n_dev"], p["control_items"])),
            (len(n.judged) + 2, p["n_test"] + p["n_heldout"]),
        ]
        return sum(self.card.answered(*one, p) for one in asked)

    def importance(self) -> float:
        """The study's own criterion on every draw; the others as if all read half the blocks."""
        p, card, blocks = self.p, self.card, self.card.arch.blocks
        results = KINDS * p["importance_items"] * blocks * p["importance_draws"]
        lines = max(1, min(p["importance_batch"], results))
        written = results * (1 - ACCEPTED) * ANSWER / lines * card.written(lines)
        read = card.read(p["importance_items"], results * (PROMPT + ANSWER) / 2)
        others = [one for one in rankings(p["rankings"])[1:] if one.criterion.calibrated]
        passes = len(others) * blocks / 2
        pictures = passes * p["importance_items"]
        own = max(card.launches * RESULT * results, written + read)
        return own + card.read(pictures, pictures * TOLD, passes)

    def quantization(self) -> float:
        """Three models' activations, the searches, and every quantized model's errors."""
        p, n = self.p, self.counts
        pictures = 3 * p["activation_items"] + len(n.quantized) * p["quantization_items"]
        read = self.card.read(pictures, pictures * TOLD, pictures)
        return read + self.card.searched(*n.searched(), p["quantization_items"])

    def latency(self) -> float:
        repeats = len(self.counts.judged) * (3 * ROUNDS + self.p["latency_repeats"])
        written = self.p["latency_tokens"] * self.card.written(1)
        return repeats * (self.card.read(1, PROMPT) + written)

    def rest(self) -> float:
        loads = self.counts.loads * FP16 * self.card.arch.parameters() / DISK
        return loads + 8 * self.card.launches * START + self.sessions * INSTALL


PARTS = {
    "fine-tuning (02, 05)": ("compute", Run.training),
    "answers (02, 04, 05, 07, 08)": ("compute to read, bandwidth to write", Run.answers),
    "importance (03)": ("bandwidth", Run.importance),
    "activations, searches, errors (06, 07)": ("compute", Run.quantization),
    "latency (08)": ("bandwidth", Run.latency),
    "loads, starts, installation": ("disk and host", Run.rest),
}


def read_runs() -> dict[str, Run]:
    known, seven_b = known_parameters(read_notebooks(ROOT)), shapes.llava_7b()
    rows = pd.read_csv(ROOT / "reports/gpu-rehearsal/rehearsal.csv")
    measured = rows.set_index(["step", "variant", "quantity"]).measured
    runs = {}
    for name, (cards, sessions) in RUNS.items():
        p = {parameter: declared.default for parameter, declared in known.items()}
        p |= read_params(ROOT / "params" / f"{name}.yaml", known)
        arch = architecture(p)
        p, card = batches.settled(p, arch, cards, KAGGLE.gib), Card(arch, seven_b, measured)
        runs[name] = Run(p, Counts(p, arch), card, cards, sessions)
    return runs


def hours(run: Run, launches: float = 1) -> dict[str, float]:
    run = replace(run, card=replace(run.card, launches=launches))
    return {name: float(seconds(run)) / 3600 for name, (_, seconds) in PARTS.items()}


def table(runs: dict[str, Run]) -> str:
    """The page's table in Markdown: hours by part and run, their sums, and what was counted."""
    told = [hours(run) for run in runs.values()]
    sums = {1: [], 2: []}
    for launches, found in sums.items():
        found += [sum(hours(run, launches).values()) for run in runs.values()]
    counted = {
        "models asked": [len(run.counts.asked) for run in runs.values()],
        "fine-tunes": [1 + len(run.counts.tuned) for run in runs.values()],
        "loads": [run.counts.loads for run in runs.values()],
    }
    heads = [f"`{name}`, {run.cards} T4" for name, run in runs.items()]
    lines = [["hours", "rests on", *heads], ["---", "---", *("---:" for _ in runs)]]
    for part, (rests, _) in PARTS.items():
        lines.append([part, rests, *(f"{each[part]:.2f}" for each in told)])
    lines.append(["**in all**", "", *(f"**{found:.1f}**" for found in sums[1])])
    lines.append(["if launches take twice as long", "", *(f"{found:.1f}" for found in sums[2])])
    lines += [[what, "run file", *map(str, numbers)] for what, numbers in counted.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    runs = read_runs()
    print(table(runs))
    print(json.dumps({name: round(sum(hours(run).values()), 2) for name, run in runs.items()}))


if __name__ == "__main__":
    main()
