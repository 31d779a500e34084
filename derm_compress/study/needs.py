"""What the stages of a run need: GiB of one GPU by batch, bytes of disk. Plans by shapes, no torch.

Memory comes from model.memory's plans; nothing here is measured, and time is not foretold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from derm_compress.data import dialogue
from derm_compress.method.importance.rankings import RUN, Ranking, rankings
from derm_compress.method.quantization.methods import Form, forms
from derm_compress.model.memory import (
    ADAPTED,
    FP16,
    FP32,
    GIB,
    PROMPT,
    plan_answers,
    plan_peak,
    plan_training,
    plan_weights,
    too_small,
)
from derm_compress.model.shapes import Architecture
from derm_compress.model.variants import RIVAL, paper_depth

ANSWER = 60  # tokens of an answer
GROUPED = (  # one of each that share inputs
    "self_attn.q_proj",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
TAP = 32  # bytes alive for each value of a projection whose statistics are summed


@dataclass(frozen=True)
class Step:
    """A part of a stage: GiB of one GPU as a function of the parameter that sets the batch."""

    stage: str
    what: str
    gib: Callable[[int], float]
    parameter: str = ""
    batch: int = 1
    disk: float = 0.0  # bytes that stay


class Needs:
    """Parts of a run with these parameters, on this architecture and so many GPUs.

    gib: of each GPU; where none holds the model and its answers, it is spread over several.
    """

    def __init__(self, p: dict, arch: Architecture, gpus: int = 1, gib: float = 0.0):
        self.p, self.arch, self.gpus, self.gib = p, arch, gpus, gib
        self.weights = sum(plan_weights(arch).values())
        self.kinds = len(dialogue.QUESTIONS)
        self.rival = RIVAL in p["rankings"] and RIVAL in p["sft_rivals"]

    def steps(self) -> list[Step]:
        """All parts of all stages."""
        p, arch = self.p, self.arch
        pictures = p["n_train"] + p["n_test"] + p["n_heldout"]
        rivals = len({*p["sft_rivals"]} & {*p["rankings"]})
        tuned = 3 + rivals + 2 * p["relearning"] + len(p["sft_depths"]) + 2 * (p["sft_seeds"] - 1)
        tuned += bool(p["distillation"])
        tune = self.training(p["finetune_rank"])
        heal = self.training(p["sft_rank"], teacher=self.weights if p["distillation"] else 0.0)
        adapters = self.adapter(p["finetune_rank"]), tuned * self.adapter(p["sft_rank"])
        statistics = 10 * 3 * self.tokens(1) * arch.hidden
        scales = (4 + self.rival) * FP32 * arch.blocks * 5 * arch.hidden
        scales += 3 * sum(map(self.codes, self.coded))

        def step(stage, what, gib, parameter="", *, disk=0.0):
            batch = p[parameter] if parameter else 1
            batch = max(1, *batch) if isinstance(batch, list) else batch
            return Step(stage, what, gib, parameter, batch, disk)

        def answers(stage):
            return step(stage, "answers", self.answering, "batch_size")

        def ranking(one):
            return step("03_layer_importance", one.name, self.scoring(one), "importance_batch")

        def merging(stage):
            return step(stage, "merging", lambda _: self.merging())

        mending, allocation = [], []
        if p["replace_me"]:
            runs = paper_depth(6, arch.blocks)
            mending = [step("05_sft", "ReplaceMe", self.mending, disk=runs * FP32 * arch.hidden**2)]
        if p["budget_gib"]:
            allocation = [step("09_allocation", "costs", self.differentiating)]
            allocation.append(answers("09_allocation"))
        steps = [
            step("01_data", "pictures", lambda _: 0.0, disk=pictures * p["image_size"] ** 2 * 3),
            answers("02_finetune"),
            step("02_finetune", "fine-tuning", tune, "finetune_batch", disk=adapters[0]),
            *map(ranking, rankings([*p["rankings"], RUN])),
            answers("04_pruning"),
            step("05_sft", "fine-tuning", heal, "sft_batch", disk=adapters[1]),
            *mending,
            answers("05_sft"),
            step(
                "06_activation_analysis",
                "statistics",
                self.watching,
                "activation_batch",
                disk=statistics,
            ),
            step("07_quantization", "search", self.calibrating, "quantization_batch", disk=scales),
            step("07_quantization", "errors", self.comparing, "quantization_batch"),
            answers("07_quantization"),
            answers("08_evaluation"),
            step("08_evaluation", "latency", self.timing, "latency_batches"),
            *allocation,
        ]
        return [*steps, *map(merging, list(dict.fromkeys(one.stage for one in steps))[1:])]

    def merging(self) -> float:
        """GiB while an adapter becomes part of the weights, linear by linear, on one GPU."""
        largest = max(out * into for out, into in self.arch.linears.values())
        return self.weights + (FP32 + FP16) * largest / GIB

    @property
    def spread(self) -> bool:
        """Whether no GPU holds the model and its answers."""
        asked = {"batch": self.p["batch_size"], "new_tokens": self.p["max_new_tokens"]}
        return too_small(self.arch, self.gpus, self.gib, **asked)

    def answering(self, batch: int) -> float:
        """GiB on the first GPU, of a model that is spread or whole."""
        gpus = self.gpus if self.spread else 1
        return plan_answers(self.arch, batch=batch, new_tokens=self.p["max_new_tokens"], gpus=gpus)

    def timing(self, batch: int) -> float:
        """GiB while latency is measured, which one GPU does alone."""
        new = self.p["latency_tokens"]
        plan = plan_peak(self.arch, batch=batch, prompt_tokens=PROMPT, new_tokens=new)
        return sum(plan.values())

    def tokens(self, batch: int) -> int:
        return batch * (self.arch.image_tokens + PROMPT + ANSWER)

    def reading(self, batch: int) -> float:
        """GiB of a model that reads prompts with their answers, and keeps no cache."""
        plan = plan_peak(self.arch, batch=batch, prompt_tokens=PROMPT + ANSWER, new_tokens=0)
        return sum(plan.values()) - plan["kv_cache"]

    def watching(self, batch: int) -> float:
        return self.reading(batch) + TAP * self.tokens(batch) * self.arch.intermediate / GIB

    def comparing(self, batch: int) -> float:
        """GiB of a quantized model while a block's outputs are compared with what they were."""
        return self.reading(batch) + TAP * self.tokens(batch) * self.arch.hidden / GIB

    def mending(self, _: int) -> float:
        """GiB while all questions about a picture are read, and a block's map is solved for."""
        return self.reading(self.kinds) + 6 * 2 * FP32 * self.arch.hidden**2 / GIB

    def adapter(self, rank: int) -> int:
        """Bytes of one adapter."""
        return FP32 * rank * self.arch.blocks * sum(map(sum, self.arch.linears.values()))

    def training(self, rank: int, *, teacher: float = 0.0) -> Callable[[int], float]:
        """GiB of a fine-tune: its fp16 weights before they are rounded to NF4, or the training."""
        how = {"rank": rank, "form": ADAPTED[self.p["adapter_base"]], "checkpointing": True}
        how["teacher"] = teacher

        def gib(batch: int) -> float:
            plan = plan_training(self.arch, batch=batch, **how)
            return max(teacher + self.weights, sum(plan.values()))

        return gib

    @property
    def coded(self) -> list[Form]:
        """What GPTQ is asked for."""
        asked = forms(self.p["methods"], self.p["bits"], self.p["group_size"])
        return [form for form in asked if form.coded]

    def codes(self, form: Form) -> float:
        """Bytes of all linears' codes, and their groups' scales and zeros, in a form."""
        plan = plan_weights(self.arch, form=form.format())
        return GIB * (plan["decoder_linears"] + plan["quantization_scales"])

    def calibrating(self, batch: int) -> float:
        """GiB while one block at a time is on the GPU, with what is before the blocks.

        A block's inputs are summed in fp32, and GPTQ factors the widest sum. The prompts about a
        picture are read together: their common beginning, then the rest of each.
        """
        arch, plan = self.arch, plan_weights(self.arch)
        around = sum(plan[part] for part in ("vision_tower", "projector", "embedding"))
        block = plan["decoder_linears"] / arch.blocks
        widths = [arch.linears[name][1] for name in GROUPED if name in arch.linears]
        copies = 4 if self.coded else 2
        sums = FP32 * (copies * max(widths) ** 2 + sum(width**2 for width in widths))
        pictures = max(1, batch // self.kinds)
        held = FP32 * max(self.calibration(pictures)) * (max(widths) + 4 * arch.hidden)
        read = 2 * arch.cache_width * self.tokens(self.kinds * pictures)
        held += FP16 * (read + pictures * arch.tower_values)
        return around + 2 * copies * block + (sums + self.waiting() + held) / GIB

    def calibration(self, pictures: int) -> tuple[float, float]:
        """Tokens that a quantizer's calibration reads once a picture, and once a prompt."""
        once = pictures * (self.arch.image_tokens + PROMPT / 2)
        return once, self.kinds * pictures * (PROMPT / 2 + ANSWER)

    def waiting(self) -> float:
        """Bytes of a model's hidden states between two blocks."""
        return FP16 * sum(self.calibration(self.p["quantization_items"])) * self.arch.hidden

    def held(self, ranking: Ranking, read: float, told: float) -> float:
        """Bytes that a reading keeps of `read` tokens of pictures and `told` of their questions.

        Keys and values of all blocks, one of them twice, and one's joined for every question; what
        each unit starts from, or for angular each sublayer ends in.
        """
        cache, state = FP16 * 2 * self.arch.cache_width, FP16 * self.arch.hidden * self.arch.blocks
        states = 0.0
        if ranking.criterion.keeps == "units":
            states = max(1, len(ranking.parts)) * (read + told)
        elif ranking.criterion.keeps == "ends":
            states = 2 * told
        joined = 2 * self.kinds * read + told
        return cache * ((self.arch.blocks + 1) * (read + told) + joined) + state * states

    def scoring(self, ranking: Ranking) -> Callable[[int], float]:
        """GiB of a criterion's values, `batch` questions at once, a picture's together."""
        if not ranking.criterion.calibrated:
            return lambda batch: self.reading(1)
        if ranking.criterion.keeps == "gradients":
            return self.differentiating
        return lambda batch: self.leaving_out(ranking, max(1, batch // self.kinds), batch)

    def differentiating(self, batch: int) -> float:
        """GiB of gradients, a picture at a time whatever the batch.

        It holds what enters every block, one block's inner values, and a gradient twice.
        """
        arch = self.arch
        state = FP16 * arch.hidden * arch.blocks
        inner = FP16 * (8 * arch.hidden + 4 * arch.intermediate)
        weight = (FP16 + FP32) * max(out * into for out, into in arch.linears.values())
        told = self.kinds * (arch.image_tokens + PROMPT / 2 + PROMPT + ANSWER)
        return self.reading(1) - self.tower() + ((state + inner) * told + weight) / GIB

    def leaving_out(self, ranking: Ranking, pictures: int, batch: int) -> float:
        """GiB of criteria that read `pictures` with their questions, once with every unit gone.

        Pictures are looked at, then read; after that the tower is away. Answers without a block:
        the model's own are read and written, in lines of full length, for all pictures, the others
        for half of them, after drafts that may be as long.
        """
        prefix, most = self.arch.image_tokens + PROMPT / 2, self.p["max_new_tokens"]
        some, lines, own, answer = pictures, 0.0, 0.0, ANSWER
        if ranking.criterion.name == "output_similarity":
            cache = FP16 * 2 * self.arch.cache_width * self.arch.blocks
            lines = cache * batch * (prefix + PROMPT + most) / GIB
            own = cache * pictures * (prefix + self.kinds * PROMPT) / GIB
            some, answer = -(-pictures // 2), most
        told = self.kinds * some * (PROMPT + answer)
        looking = self.reading(pictures)
        later = self.reading(some) + self.held(ranking, some * prefix, told) / GIB
        return lines + max(looking, looking + own - self.tower(), later - self.tower())

    def tower(self) -> float:
        plan = plan_weights(self.arch)
        return plan["vision_tower"] + plan["projector"]
