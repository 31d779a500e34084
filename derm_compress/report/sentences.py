"""What a run's numbers say: templates/findings/*.md.j2, a sentence after each `- `. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath

import numpy as np
import pandas as pd
from jinja2.exceptions import TemplateNotFound

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges import controls
from derm_compress.files import PACKAGE, read_json
from derm_compress.model.variants import DISTILLED, MENDED
from derm_compress.report import rule, tables, trainings, wording
from derm_compress.report.page import inert, page
from derm_compress.report.paper import model
from derm_compress.report.paper import numbers as paper
from derm_compress.report.results import Results, first_to_go
from derm_compress.report.tables import allocation, answer, claims, statistics
from derm_compress.report.tables.quantizers import plain_awq

STAGES = {  # stage: the templates that its notebook ends with
    "01_data": "data",
    "02_finetune": "extra_baselines",
    "03_layer_importance": "fig3_layer_importance extra_agreement",
    "04_pruning": "table1_pruning extra_criteria",
    "05_sft": "table2_sft extra_healed_rivals extra_seeds",
    "06_activation_analysis": "fig4_activations",
    "07_quantization": "table3_quantization extra_alpha extra_equal_bytes",
    "08_evaluation": "answer beside_answer table4_efficiency table5_ablation extra_diagnosis "
    "extra_baselines extra_judges extra_controls claims",
    "09_allocation": "extra_allocation",
}


def findings(stage: str, results: Results | dict):
    """The sentences that a stage's notebook ends with, as Markdown; 01's are of its report."""
    from IPython.display import Markdown

    if isinstance(results, dict):
        results = Results(data_report=results)
    facts = Facts(results)
    found = [text for stem in STAGES[stage].split() for text in facts.said(stem)]
    found = found or [f"{results.without_score or 'Scores need weights'}."]
    return Markdown("\n".join(f"- {inert(text)}" for text in found))


def headline(results: Results) -> str:
    """What the compressed model loses to the same model with the same training."""
    return Facts(results).said("answer")[0]


KNOWN = {  # in templates, beside the facts
    "allocation": allocation,
    "answer": answer,
    "claims": claims,
    "controls": controls,
    "rule": rule,
    "paper": paper,
    "plain_awq": plain_awq,
    "MENDED": MENDED,  # these stand for a criterion
    "DISTILLED": DISTILLED,
    "statistics": statistics,
    "ANEW": wording.ANEW,
    "SURE": rule.SURE,  # a corrected p below this is a difference
    "FEW": 3,  # rivals, up to which each gets its own sentence
}


class Facts:
    """What templates and figures can ask of a run: its tables, and the little that no table has.

    graph: the stages' inputs; asked: what the judge goes by.
    """

    def __init__(
        self,
        results: Results,
        built: Mapping[str, pd.DataFrame | None] | None = None,
        *,
        graph: Mapping[str, list[str]] | None = None,
        asked: str = "",
    ):
        self.results, self.graph, self.asked = results, graph or {}, asked
        self.built = dict(built or {})

    def said(self, stem: str) -> list[str]:
        """The sentences of one template; none where there is no template."""
        try:
            text = page(f"findings/{stem}.md.j2", facts=self, results=self.results, **KNOWN)
        except TemplateNotFound:
            return []
        return [plain(part) for part in re.split(r"(?m)^- ", text) if part.strip()]

    def title(self, stem: str, **more) -> str:
        """What a figure shows, in one sentence."""
        return plain(page(f"titles/{stem}.j2", facts=self, results=self.results, **KNOWN, **more))

    def table(self, stem: str) -> pd.DataFrame | None:
        """One of the run's tables; None where the results do not suffice."""
        if stem not in self.built:
            self.built[stem] = tables.make(stem, self.results)
        return self.built[stem]

    def get(self, name: str):
        """A field of the results, or a table; None where it is missing or empty."""
        found = getattr(self.results, name) if hasattr(self.results, name) else self.table(name)
        return None if found is None or not len(found) else found

    def rows(self, stem: str, having: str = "", **wanted) -> list[dict]:
        """A table's rows that have a number in the column `having` and these values in others;
        unknown cells are nan."""
        frame = self.table(stem)
        if frame is None:
            return []
        frame = frame.dropna(subset=[having] if having else [])
        for name, value in wanted.items():
            frame = frame[frame[name] == value]
        return frame.astype(object).where(frame.notna(), np.nan).to_dict("records")

    def row(self, stem: str, having: str = "", **wanted) -> dict | None:
        """The first such row."""
        return next(iter(self.rows(stem, having, **wanted)), None)

    def compare(self, one: str, other: str) -> metrics.Difference:
        """One variant minus another, on all of stage 08's pictures where it has both."""
        frames = [self.results.evaluation, self.results.answers]
        known = [f for f in frames if f is not None and {one, other} <= set(f.variant)]
        return trainings.apart(self.results, known[0] if known else None, one, other)

    def synthetic(self) -> bool:
        """Whether the pictures are the package's own."""
        return (self.results.data_report or {}).get("source") == "synthetic"

    def blocks_for(self, gb: float) -> int:
        """How many of 32 blocks must go until the planned peak at 7B, in 4-bit AWQ, fits."""
        depths = range(paper.BLOCKS)
        return next(n for n in depths if model.peak_gib(n, "awq") * model.GB <= gb)

    def speed(self) -> dict[str, float] | None:
        """How many times as fast a token is pruned, packed, and both (`full`); `ms` of the whole,
        and whether the quartiles of both lie apart from it."""
        names = {"pruned": self.results.main[1], "full": self.results.full}
        names["packed"] = self.results.variant(0, quantizer="awq")
        known = self.results.one_prompt
        if known is None:
            return None
        known, whole = known.set_index("variant"), self.results.variant(0)
        if not {*names.values(), whole} <= set(known.index):
            return None
        ms = known.decode_ms_per_token
        ends = known.loc[[whole, names["full"]], [f"decode_ms_per_token_{e}" for e in ("lo", "hi")]]
        (lo, hi), (full_lo, full_hi) = ends.to_numpy()
        told = {"ms": ms[whole], "apart": full_hi < lo or hi < full_lo}
        return told | {way: ms[whole] / ms[name] for way, name in names.items()}

    def specimen(self) -> dict | None:
        """How well an embedded model was made: what it can see at best; None of any other."""
        folder = PACKAGE / "model" / f"{self.base()}_llava"
        if not (folder / "recipe.json").is_file():
            return None
        told = read_json(folder / "recipe.json")
        seen = told["tower_accuracy"]
        config = read_json(folder / "config.json").get("text_config", {})
        start = config.get("initializer_range") if self.base() == "tiny" else None
        return told | {"worst": min(seen, key=seen.get), "initializer_range": start}

    def pictures(self) -> tuple[int, int]:
        """On how many pictures there are scores: Tables 1 to 3's, and Tables 4 and 5's."""
        frames = self.results.answers, self.results.evaluation
        return tuple(0 if f is None else f[f.score.notna()]["item"].nunique() for f in frames)

    def split_sizes(self) -> dict[str, int]:
        """{split: pictures}, from stage 01's report."""
        counts = self.results.data_report["counts"]
        return {split: sum(by_label.values()) for split, by_label in counts.items()}

    def base(self) -> str:
        """The model that was compressed: tiny."""
        if self.results.variants is None:
            return ""
        return PurePath(json.loads(self.results.variants.recipe.iloc[0])["base"]).name

    def subject(self) -> str:
        """That model with its size: the tiny model (2.67 M parameters)."""
        memory, said = self.results.memory, f"the {self.base()} model"
        if memory is None or memory.params_b.max() >= 1:
            return said
        return f"{said} ({1000 * memory.params_b.max():.3g} M parameters)"

    def label(self, variant: str) -> str:
        """A variant for people; its id where no stage says what it is."""
        return self.results.names.get(variant, variant)

    def rankings(self) -> list[str]:
        """Every ranking that this run scored or removed blocks by."""
        values, variants = self.results.values, self.results.variants
        scored = [] if values is None else values.ranking
        tried = [] if variants is None else variants.criterion
        return list(dict.fromkeys([*scored, *tried, *(self.results.plans or {})]))

    def of_main_models(self, stem: str) -> list[dict]:
        """A table's rows of the unpruned model and of the operating point, before and after SFT."""
        n = self.results.operating
        main = (0, False), (n, False), (n, True)
        return [row for row in self.rows(stem) if (row["blocks_removed"], row["healed"]) in main]

    def errors(self) -> list[dict]:
        """Per main model and width: mean relative output errors of AWQ and of plain rounding."""
        keys = ["blocks_removed", "healed", "bits"]
        columns = [*keys, "method", "relative_error"]
        rows = pd.DataFrame(self.of_main_models("table3_quantization"), columns=columns)
        wide = rows.pivot(index=keys, columns="method", values="relative_error")
        wide = wide.reindex(columns=["awq", "rtn"]).dropna().reset_index()
        return wide.assign(worse=wide.awq > wide.rtn).to_dict("records")

    def against_blind(self) -> dict[str, list[dict]]:
        """Per main model, at each width: AWQ minus the best method that sees no activations."""
        keys, ends = ["blocks_removed", "healed", "bits"], ["difference_lo", "difference_hi"]
        columns = [*keys, "method", "calibrated", "difference", *ends]
        rows = pd.DataFrame(self.of_main_models("extra_quantization_tests"), columns=columns)
        rows = rows[rows.calibrated.eq(False)].dropna(subset="difference")
        rows = rows.sort_values("difference").drop_duplicates(keys, keep="last")
        rows = rows.sort_values(keys, ascending=[True, True, False])
        rows[ends] = rows[ends[::-1]]
        rows[["difference", *ends]] = 0 - rows[["difference", *ends]]
        by_model = rows.groupby(["blocks_removed", "healed"])
        return {wording.model(part.iloc[0]): part.to_dict("records") for _, part in by_model}

    def gone(self, name: str) -> list:
        """What a plan removes up to the operating point."""
        return first_to_go(self.results.plans[name], self.results.operating)

    def agreeing(self) -> list[dict]:
        """The study's ranking beside each other that looks at blocks, the least alike first."""
        own, found = self.results.criterion, []
        for row in self.rows("extra_agreement"):
            other = row["other"] if row["one"] == own else row["one"]
            if own in (row["one"], row["other"]) and wording.is_another_criterion(other, own):
                found.append(row | {"other": other})
        return sorted(found, key=lambda row: row["rho"])


def plain(text: str) -> str:
    """A sentence as it is read: on one line, without blanks before its points."""
    return re.sub(r" ([,;:.])(?= |$)", r"\1", " ".join(text.split()))
