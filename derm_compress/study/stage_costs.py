"""What the parts of a run cost: seconds, GiB of a GPU, bytes of disk. Plans and estimates. No torch.

Memory comes from memory.py's plans, time from cost.py (35 % of a T4's fp16 peak in readings, 60 % of its bandwidth in
decoding); nothing here is measured. Assumed besides: the lengths below, and a model read from disk at LOADING.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from derm_compress.data import dialogue
from derm_compress.method.importance.rankings import CALIBRATED, Ranking, rankings
from derm_compress.method.quantization import forms, methods
from derm_compress.model import memory
from derm_compress.model.memory import CONVERSATION, FP16, FP32, GIB
from derm_compress.model.shapes import Architecture
from derm_compress.study import cost

PROMPT, ANSWER = 24, 60  # tokens beside a picture's: of a question, an answer
ENDLESS = 0.04  # share of answers that go on to max_new_tokens; their whole batch waits, half of all batches of 16
LOADING = 0.5e9  # bytes a second, from disk to the GPU
PICTURES = 15  # photographs a second, read and compared
FP32_FLOPS = 8.1e12  # a second, of a T4: statistics of a quantizer's search are summed in fp32
SEARCH = 29_000  # tokens whose sums cost as much as a group's search: 6.3 s at 51 TFLOP/s (reports/gpu-rehearsal)
WARMUP = 3  # runs before those that latency counts
GROUPED = (
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)  # one of each that share inputs
TAP = 32  # bytes alive for each value of a projection whose statistics are summed


@dataclass(frozen=True)
class Step:
    """A part of a stage: seconds, and GiB of one GPU as a function of the parameter that sets the batch."""

    stage: str
    what: str
    seconds: float
    gib: Callable[[int], float] = lambda batch: 0.0
    parameter: str = ""
    batch: int = 1
    disk: float = 0.0  # bytes that stay
    gpus: int = 1


class Costs:
    """Parts of a run with these parameters of all notebooks, on this architecture and device."""

    def __init__(self, p: dict, arch: Architecture, device: cost.Device = cost.T4, gpus: int = 1):
        self.p, self.arch, self.device, self.gpus = p, arch, device, gpus
        self.weights = sum(memory.plan_weights(arch).values())
        self.kinds = len(dialogue.QUESTIONS)
        self.ranked = rankings(p["rankings"])
        self.rival = "magnitude" in p["rankings"]
        self.adapters = {  # bytes of one adapter by rank
            rank: FP32 * rank * arch.blocks * sum(out + into for out, into in arch.linears.values())
            for rank in (p["finetune_rank"], p["sft_rank"])
        }

    @property
    def answer_tokens(self) -> int:
        return min(ANSWER, self.p["max_new_tokens"])

    def load(self, times: float = 1) -> float:
        return times * self.weights * GIB / LOADING

    def answers(self, pictures: int) -> float:
        """Seconds of one model's answers to all questions about so many pictures."""
        batch, n, tokens = (
            self.p["batch_size"],
            self.kinds * pictures,
            self.arch.image_tokens + PROMPT,
        )
        endless = 1 - (1 - ENDLESS) ** min(batch, n)
        step = sum(
            share
            * cost.decode_seconds(self.arch, self.device, batch=batch, tokens=length, before=tokens)
            for share, length in (
                (1 - endless, self.answer_tokens),
                (endless, self.p["max_new_tokens"]),
            )
        )
        return (
            n * cost.prefill_seconds(self.arch, self.device, tokens=tokens)
            + math.ceil(n / batch) * step
        )

    def answering(self, batch: int) -> float:
        """GiB on the first GPU: blocks and cache are spread over all (models.spread)."""
        sizes = {"prompt_tokens": PROMPT, "new_tokens": self.p["max_new_tokens"]}
        plan = memory.plan_peak(self.arch, batch=batch, **sizes)
        alone = sum(plan.values())
        shared = sum(plan[part] for part in ("decoder_linears", "block_norms", "kv_cache"))
        return alone - shared * (1 - 1 / self.gpus) - plan["head"] * (self.gpus > 1)

    def timing(self, batch: int) -> float:
        """GiB while latency is measured, which one GPU does alone."""
        sizes = {"prompt_tokens": PROMPT, "new_tokens": self.p["latency_tokens"]}
        return sum(memory.plan_peak(self.arch, batch=batch, **sizes).values())

    @property
    def timed(self) -> tuple[int, int]:
        """Variants of evaluate.table_variants: in fp16 or NF4, and of integers, which a T4 has no kernel for."""
        four = set(self.p["methods"]) if 4 in self.p["bits"] else set()
        return 4 + ("bitsandbytes" in four), (3 + self.rival) * ("awq" in four) + len(
            four & {"rtn", "rtn_symmetric"}
        )

    def measuring(self) -> float:
        """Seconds of all latencies."""
        arch, new, before = self.arch, self.p["latency_tokens"], self.arch.image_tokens + PROMPT
        (ready, integers), runs, taken = self.timed, WARMUP + self.p["latency_repeats"], 0.0
        for batch in {1, *self.p["latency_batches"]}:
            read = cost.prefill_seconds(arch, self.device, tokens=before, batch=batch)
            written = cost.decode_seconds(arch, self.device, batch=batch, tokens=new, before=before)
            decoded = new * cost.unpacking_seconds(arch, self.device)
            taken += runs * ((ready + integers) * (read + written) + integers * decoded)
        return taken

    def readings(self, prompts: int) -> float:
        tokens = self.arch.image_tokens + PROMPT + ANSWER
        return prompts * cost.prefill_seconds(self.arch, self.device, tokens=tokens)

    def reading(self, batch: int) -> float:
        """GiB of a model that reads prompts with their answers, and no cache."""
        plan = memory.plan_peak(self.arch, batch=batch, prompt_tokens=PROMPT + ANSWER, new_tokens=0)
        return sum(plan.values()) - plan["kv_cache"]

    def tokens(self, batch: int) -> int:
        return batch * (self.arch.image_tokens + PROMPT + ANSWER)

    def watching(self, batch: int) -> float:
        return self.reading(batch) + TAP * self.tokens(batch) * self.arch.intermediate / GIB

    def comparing(self, batch: int) -> float:
        """GiB on the GPU of the unquantized model, whose blocks' outputs wait for the other's."""
        return (
            self.reading(batch)
            + FP32 * self.arch.blocks * self.tokens(batch) * self.arch.hidden / GIB
        )

    def training(self, rank: int) -> Callable[[int], float]:
        """GiB of a fine-tune: the fp16 weights before they are rounded to NF4, or the training itself."""

        def gib(batch: int) -> float:
            how = {"rank": rank, "batch": batch, "checkpointing": True}
            return max(self.weights, sum(memory.plan_training(self.arch, **how).values()))

        return gib

    def fine_tune(self, steps: int, batch: int, removed: int = 0) -> float:
        tokens = self.arch.image_tokens + CONVERSATION
        how = {"tokens": tokens, "blocks_removed": removed, "checkpointing": True}
        return steps * batch * cost.training_seconds(self.arch, self.device, **how)

    def calibrating(self, batch: int) -> float:
        """GiB while one block at a time is on the GPU: what is before the blocks, a block, its inputs' sums in fp32.

        The prompts about a picture are read together: their common beginning, then the rest of each.
        """
        arch, plan = self.arch, memory.plan_weights(self.arch)
        around = sum(plan[part] for part in ("vision_tower", "projector", "embedding"))
        block = plan["decoder_linears"] / arch.blocks
        widths = [arch.linears[name][1] for name in GROUPED if name in arch.linears]
        sums = FP32 * (2 * max(widths) ** 2 + sum(width**2 for width in widths))
        pictures = max(1, batch // self.kinds)
        held = FP32 * max(self.calibration(pictures)) * (max(widths) + 4 * arch.hidden)
        held += FP16 * (
            2 * arch.cache_width * self.tokens(self.kinds * pictures) + pictures * arch.tower_values
        )
        return around + 4 * block + (sums + self.waiting() + held) / GIB

    def calibration(self, pictures: int) -> tuple[float, float]:
        """Tokens of what a quantizer's calibration reads once a picture, and once a prompt."""
        return pictures * (self.arch.image_tokens + PROMPT / 2), self.kinds * pictures * (
            PROMPT / 2 + ANSWER
        )

    def waiting(self) -> float:
        """Bytes of one model's hidden states between two blocks: of memory or, with a scratch folder, of disk."""
        return FP16 * sum(self.calibration(self.p["quantization_items"])) * self.arch.hidden

    def search(self) -> float:
        """Seconds of one model's calibration and search: H = X^T X of each group, and errors by H, in fp32."""
        pictures, arch = self.p["quantization_items"], self.arch
        widths = [arch.linears[name][1] for name in GROUPED if name in arch.linears]
        sums = (
            2
            * (sum(self.calibration(pictures)) + SEARCH)
            * arch.blocks
            * sum(width**2 for width in widths)
        )
        begin, rest = self.calibration(1)
        read = cost.reading_flops(arch, begin) + cost.picture_flops(arch)
        read += self.kinds * cost.reading_flops(arch, rest / self.kinds, before=begin)
        return pictures * read / (self.device.flops * self.device.prefill) + sums / FP32_FLOPS

    def ranking(self, ranking: Ranking) -> float:
        """Seconds of one criterion's values of all blocks; iterative ones score ever fewer blocks anew."""
        p, arch, n = self.p, self.arch, self.p["importance_items"]
        how = {
            "items": n,
            "questions": self.kinds,
            "prompt_tokens": PROMPT,
            "answer_tokens": self.answer_tokens,
        }
        how |= {"blocks": range(arch.blocks), "accepted": 0.85, "batch": p["importance_batch"]}
        told = cost.importance_seconds(arch, self.device, **how)
        once = self.readings(self.kinds * n)
        each = {
            "output_similarity": told["drafts"],
            "perplexity": told["reading"],
            "taylor": 3 * once,
        }
        each |= dict.fromkeys(("block_influence", "angular"), once)
        times = (
            min(p["iterative_blocks"], arch.blocks) * 2 / 3 if "iterative" in ranking.options else 1
        )
        return each.get(ranking.criterion, self.load()) * times

    def held(self, ranking: Ranking, read: float, told: float) -> float:
        """Bytes that a reading keeps for `read` tokens of pictures and `told` of the questions about them.

        Keys and values of all blocks, one of them twice, and one's joined for every question; what each unit starts
        from, or for angular each sublayer ends in.
        """
        cache, state = FP16 * 2 * self.arch.cache_width, FP16 * self.arch.hidden * self.arch.blocks
        starts = {"output_similarity", "perplexity"} & {ranking.criterion}
        states = max(1, len(ranking.parts)) * (read + told) * len(starts) + 2 * told * (
            ranking.criterion == "angular"
        )
        joined = 2 * self.kinds * read + told
        return cache * ((self.arch.blocks + 1) * (read + told) + joined) + state * states

    def scoring(self, ranking: Ranking) -> Callable[[int], float]:
        """GiB of a criterion's values, `batch` questions at once, those about one picture together (reading.Reading).

        Pictures are looked at, then read; after that the tower is away. Answers without a block: the model's own are
        read and written, in lines of full length, for all pictures, the others for half of them, after drafts that may
        be as long. Taylor holds what enters every block, one block's inner values, and a gradient twice.
        """
        arch, prefix, most = (
            self.arch,
            self.arch.image_tokens + PROMPT / 2,
            self.p["max_new_tokens"],
        )
        asks = ranking.criterion == "output_similarity"
        cache, state = FP16 * 2 * arch.cache_width * arch.blocks, FP16 * arch.hidden * arch.blocks
        inner = FP16 * (8 * arch.hidden + 4 * arch.linears["mlp.up_proj"][0])
        weight = (FP16 + FP32) * max(out * into for out, into in arch.linears.values())
        tower = sum(memory.plan_weights(arch)[part] for part in ("vision_tower", "projector"))

        def gib(batch: int) -> float:
            if ranking.criterion == "taylor":  # a picture at a time, whatever the batch
                told = self.kinds * (prefix + PROMPT + ANSWER)
                return self.reading(1) - tower + ((state + inner) * told + weight) / GIB
            every = max(1, batch // self.kinds)
            some = -(-every // 2) if asks else every
            lines = asks * cache * batch * (prefix + PROMPT + most) / GIB
            own = asks * cache * every * (prefix + self.kinds * PROMPT) / GIB
            told = self.kinds * some * (PROMPT + (most if asks else ANSWER))
            later = self.reading(some) + self.held(ranking, some * prefix, told) / GIB
            return lines + max(
                self.reading(every), self.reading(every) + own - tower, later - tower
            )

        return gib if ranking.criterion in CALIBRATED else lambda batch: self.reading(1)

    def steps(self) -> list[Step]:
        """All parts of all stages."""
        return [
            *self.learning(),
            *self.pruning(),
            *self.healing(),
            *self.quantizing(),
            *self.evaluating(),
        ]

    @property
    def answer(self) -> dict:
        """How a Step holds a model that answers."""
        return {"gib": self.answering, "parameter": "batch_size", "batch": self.p["batch_size"]}

    def learning(self) -> list[Step]:
        """Stages 01 and 02."""
        p, every = self.p, self.p["n_train"] + self.p["n_test"] + self.p["n_heldout"]
        return [
            Step("01_data", "pictures", every / PICTURES, disk=every * p["image_size"] ** 2 * 3),
            Step("02_finetune", "answers", 2 * self.answers(p["n_test"]) + self.load(2), **self.answer),
            Step(
                "02_finetune", "fine-tuning", self.load() + self.fine_tune(p["finetune_steps"], p["finetune_batch"]),
                self.training(p["finetune_rank"]), "finetune_batch", p["finetune_batch"],
                self.adapters[p["finetune_rank"]],
            ),
        ]  # fmt: skip

    def pruning(self) -> list[Step]:
        """Stages 03 and 04."""
        p, test = self.p, self.p["n_test"]
        own, dev = 1 + len(p["depths"]), p["n_dev"] or min(64, p["n_train"])
        rivals = (len(p["rankings"]) - 1) * len(p["rival_depths"])
        answering = own * self.answers(dev + test) + rivals * self.answers(test)
        return [
            Step("03_layer_importance", "plans", self.load() * (not self.ranked), lambda _: self.weights),
            *(
                Step(
                    "03_layer_importance", ranking.name, self.load(1 / len(self.ranked)) + self.ranking(ranking),
                    self.scoring(ranking), "importance_batch", p["importance_batch"],
                )
                for ranking in self.ranked
            ),
            Step("04_pruning", "answers", self.load(2) + answering, **self.answer),
        ]  # fmt: skip

    def healing(self) -> list[Step]:
        """Stage 05."""
        p = self.p
        deep = round(6 / 32 * self.arch.blocks), round(9 / 32 * self.arch.blocks)
        tuned = [
            0,
            *deep,
            *deep[:1] * self.rival,
            *p["sft_depths"],
        ]  # blocks removed of what is healed
        tuned += [0, deep[0]] * (p["sft_seeds"] - 1)
        sft, load = (
            sum(self.fine_tune(p["sft_steps"], p["sft_batch"], n) for n in tuned),
            self.load(len(tuned)),
        )
        return [
            Step(
                "05_sft", "fine-tuning", load + sft, self.training(p["sft_rank"]), "sft_batch", p["sft_batch"],
                len(tuned) * self.adapters[p["sft_rank"]],
            ),
            Step("05_sft", "answers", load + len(tuned) * self.answers(p["n_test"]), **self.answer),
        ]  # fmt: skip

    def quantizing(self) -> list[Step]:
        """Stages 06 and 07."""
        p, sources = self.p, 4 + self.rival
        asked, common = (
            forms.forms(p["methods"], p["bits"], p["group_size"]),
            set(p["methods"]) & set(methods.IN_PAPER),
        )
        rounded = 3 * len(asked) + (sources - 3) * len(common)
        kept = sources * FP32 * self.arch.blocks * 5 * self.arch.hidden + self.waiting()
        reading = 2 * rounded * self.readings(self.kinds * p["quantization_items"])
        batch = {"parameter": "quantization_batch", "batch": p["quantization_batch"]}
        return [
            Step(
                "06_activation_analysis", "statistics",
                self.load(6) + 3 * self.readings(self.kinds * p["activation_items"] + 1), self.watching,
                "activation_batch", p["activation_batch"], 10 * 3 * self.tokens(1) * self.arch.hidden,
            ),
            Step("07_quantization", "search", sources * (self.load() + self.search()), self.calibrating,
                 **batch, disk=kept),
            Step("07_quantization", "errors", self.load(rounded + sources) + reading, self.comparing, **batch, gpus=2),
            Step("07_quantization", "answers", self.load(rounded) + rounded * self.answers(p["n_test"]), **self.answer),
        ]  # fmt: skip

    def evaluating(self) -> list[Step]:
        """Stage 08: the variants of Tables 4 and 5, and two controls."""
        p, judged = self.p, sum(self.timed)
        late = (judged + 2) * self.answers(p["n_test"] + p["n_heldout"])
        return [
            Step("08_evaluation", "answers", self.load(judged + 2) + late, **self.answer),
            Step(
                "08_evaluation", "latency", self.load(judged) + self.measuring(), self.timing, "latency_batches",
                max(1, *p["latency_batches"]),
            ),
        ]  # fmt: skip


def by_stage(steps: Iterable[Step]) -> dict[str, list[Step]]:
    found: dict[str, list[Step]] = {}
    for step in sorted(steps, key=lambda step: step.stage):
        found.setdefault(step.stage, []).append(step)
    return found
