"""What a run's numbers say: templates/findings/*.md.j2, a sentence after each `- `. No torch."""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import PurePath

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.exceptions import TemplateNotFound

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges import controls
from derm_compress.report import tables, wording
from derm_compress.report.page import inert
from derm_compress.report.paper import numbers as paper
from derm_compress.report.results import Results, answers_of, first_to_go, reaches
from derm_compress.report.tables import verdicts
from derm_compress.report.tables.statistics import POWER

SURE = 0.05  # a corrected p below this is a difference
FEW = 3  # rivals, up to which each gets its own sentence
STAGES = {  # stage: the templates that its notebook ends with
    "01_data": ("data",),
    "02_finetune": ("extra_baselines",),
    "03_layer_importance": ("fig3_layer_importance", "extra_agreement", "extra_calibration_size"),
    "04_pruning": ("table1_pruning", "extra_criteria", "extra_sublayers"),
    "05_sft": ("table2_sft", "extra_seeds"),
    "06_activation_analysis": ("fig4_activations",),
    "07_quantization": ("table3_quantization", "extra_alpha", "extra_equal_bytes"),
    "08_evaluation": (
        "headline",
        "table4_efficiency",
        "extra_comparisons",
        "extra_power",
        "extra_diagnosis",
        "extra_secondary",
        "extra_baselines",
        "extra_judges",
        "extra_side_by_side",
        "extra_verdicts",
    ),
}


def findings(stage: str, results: Results | dict):
    """The sentences that a stage's notebook ends with, as Markdown; 01's are of its report."""
    from IPython.display import Markdown

    if isinstance(results, dict):
        results = Results(data_report=results)
    facts = Facts(results)
    found = [text for stem in STAGES[stage] for text in facts.said(stem)]
    found = found or [f"{results.without_score or 'Scores need weights'}."]
    return Markdown("\n".join(f"- {inert(text)}" for text in found))


def headline(results: Results) -> str:
    """How far this model is compressed, and whether that beats pruning or quantizing alone."""
    return Facts(results).said("headline")[0]


class Facts:
    """What a template can ask of a run: its tables as rows, and the little that no table has."""

    def __init__(self, results: Results, built: Mapping[str, pd.DataFrame] | None = None):
        self.results = results
        self.built = dict(built or {})

    def said(self, stem: str) -> list[str]:
        """The sentences of one template; none where there is no template."""
        try:
            template = environment().get_template(f"{stem}.md.j2")
        except TemplateNotFound:
            return []
        text = template.render(facts=self, results=self.results)
        found = [" ".join(part.split()) for part in re.split(r"(?m)^- ", text)]
        return [re.sub(r" ([,;:.])(?= |$)", r"\1", part) for part in found if part]

    def rows(self, stem: str, **wanted) -> list[dict]:
        """A table's rows in which columns have these values, unknown cells as nan."""
        if stem not in self.built:
            self.built[stem] = tables.make(stem, self.results)
        frame = self.built[stem]
        if frame is None:
            return []
        found = frame.astype(object).where(frame.notna(), np.nan).to_dict("records")
        return [row for row in found if all(row[name] == value for name, value in wanted.items())]

    def row(self, stem: str, **wanted) -> dict | None:
        """The first such row."""
        return next(iter(self.rows(stem, **wanted)), None)

    def scored(self, stem: str, name: str = "score") -> list[dict]:
        """A table's rows that have a number there."""
        return [row for row in self.rows(stem) if not pd.isna(row[name])]

    def timed(self, variant: str) -> dict | None:
        """Table 4's row of a variant, if its decoding was timed."""
        rows = self.scored("table4_efficiency", "decode_ms_per_token")
        return next((row for row in rows if row["variant"] == variant), None)

    def compare(self, one: str, other: str) -> metrics.Difference:
        """One variant minus another, on all of stage 08's pictures where it has both."""
        frames = [self.results.evaluation, self.results.answers]
        known = [f for f in frames if f is not None and {one, other} <= set(f.variant)]
        answers = known[0] if known else None
        return metrics.paired_difference(answers_of(answers, one), answers_of(answers, other))

    def recovery(self) -> metrics.Recovery:
        """What SFT gives back at the operating point, net of what it gives the unpruned model."""
        n, named = self.results.operating, self.results.variant
        four = named(0), named(n), named(n, healed=True), named(0, healed=True)
        return metrics.recovery(*(answers_of(self.results.answers, name) for name in four))

    def pictures(self) -> tuple[int, int]:
        """On how many pictures there are scores: Tables 1 to 3's, and Tables 4 and 5's."""
        frames = self.results.answers, self.results.evaluation
        scored = [pd.DataFrame() if f is None else f.dropna(subset=["score"]) for f in frames]
        return tuple(frame["item"].nunique() if len(frame) else 0 for frame in scored)

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
        memory = self.results.memory
        size = 1 if memory is None else memory.params_b.max()
        return f"the {self.base()} model" + (
            f" ({1000 * size:.3g} M parameters)" if size < 1 else ""
        )

    def called(self, variant: str) -> str:
        """A variant for people; its id where no stage says what it is."""
        known = self.results.variants
        known = None if known is None else known[known.variant == variant]
        if known is None or known.empty:
            return variant
        row = known.iloc[0]
        if row.bits == 16:
            return wording.model(row)
        return f"{wording.model(row)}, in {row.bits:g} bits by {wording.quantizer(row.quantizer)}"

    def rankings(self) -> list[str]:
        """Every ranking that this run scored or removed blocks by."""
        values, variants = self.results.values, self.results.variants
        scored = [] if values is None else values.ranking
        tried = [] if variants is None else variants.criterion
        return list(dict.fromkeys([*scored, *tried, *(self.results.plans or {})]))

    def errors(self) -> list[dict]:
        """Per main model and width: mean relative output errors of AWQ and of plain rounding."""
        found: dict[tuple, dict] = {}
        for row in self.of_main_models("table3_quantization"):
            if row["method"] in ("awq", "rtn") and not pd.isna(row["relative_error"]):
                key = row["blocks_removed"], row["healed"], row["bits"]
                found.setdefault(key, dict(row))[row["method"]] = row["relative_error"]
        return [row for row in found.values() if {"awq", "rtn"} <= set(row)]

    def gone(self, name: str) -> list:
        """What a plan removes up to the operating point."""
        return first_to_go(self.results.plans[name], self.results.operating)

    def shared(self) -> list[dict]:
        """How many of the blocks to go each other plan of whole blocks removes, fewest first."""
        gone, found = set(self.gone(self.results.criterion)), []
        for name, plan in self.results.plans.items():
            whole = not any(isinstance(unit, str) for unit in plan["order"])
            other = name != self.results.criterion and not name.startswith("random")
            if whole and other and reaches(plan, len(gone)):
                found.append({"name": name, "blocks": len(gone & set(self.gone(name)))})
        return sorted(found, key=lambda row: row["blocks"])

    def agreeing(self) -> list[dict]:
        """The study's ranking beside each other that looks at blocks, the least alike first."""
        own, found = self.results.criterion, []
        for row in self.rows("extra_agreement"):
            other = row["other"] if row["one"] == own else row["one"]
            same = other.split("-")[0] == own.split("-")[0]
            if own in (row["one"], row["other"]) and wording.looks_at_blocks(other) and not same:
                found.append(row | {"other": other})
        return sorted(found, key=lambda row: row["rho"])

    def rivals(self) -> list[dict]:
        """The study's criterion against each rival over all depths, the strongest rival first.

        Where there are many, only those whose models have the depths that most of them have.
        """
        rows = self.scored("extra_criteria_tests", "p_all")
        depths = [row["depths"] for row in rows]
        most = max(depths, key=depths.count, default=0)
        if len(rows) > FEW:
            rows = [row for row in rows if row["depths"] == most]
        return sorted(rows, key=lambda row: row["difference_all"])

    def outliers(self) -> list[dict]:
        """Per model of stage 06: projections with outlier channels, and the largest output."""
        found = []
        for name, rows in self.results.statistics.groupby("variant", sort=False):
            loud = int((rows.outlier_channels > 0).sum())
            peak = rows.loc[rows["max"].idxmax()].to_dict()
            found.append(peak | {"variant": name, "loud": loud, "projections": len(rows)})
        return found

    def of_main_models(self, stem: str) -> list[dict]:
        """A table's rows of the unpruned model and of the operating point, before and after SFT."""
        n = self.results.operating
        main = (0, False), (n, False), (n, True)
        return [row for row in self.rows(stem) if (row["blocks_removed"], row["healed"]) in main]

    def exponents(self) -> list[dict]:
        """Per main model: plain AWQ's median exponent, how far its search lowered Eq. 7's loss."""
        search = self.results.search
        if search is None:
            return []
        search = search[search.form == plain_awq(search)].dropna(subset=["alpha"])
        found = []
        for name, rows in search.groupby("variant", sort=False):
            saved = 1 - rows.loss.sum() / rows.loss_rtn.sum()
            found.append({"variant": name, "alpha": rows.alpha.median(), "saved": saved})
        return [row for row in found if row["variant"] in main_models(self.results)]


def main_models(results: Results) -> list[str]:
    """The three that the question is about: unpruned, pruned, pruned and healed."""
    n = results.operating
    return [results.variant(0), results.variant(n), results.variant(n, healed=True)]


def plain_awq(search: pd.DataFrame) -> str | None:
    """The first form of AWQ without options that scales were searched for."""
    forms = search.form.astype(str)
    return next(iter(forms[forms.str.fullmatch(r"awq\d")]), None)


def rank_correlation(rows: list[dict], one: str, other: str) -> float:
    """Spearman's, over the rows that have both; nan where there is nothing to rank."""
    known = pd.DataFrame(rows, columns=[one, other], dtype=float).dropna()
    if len(known) < 3 or known.nunique().min() < 2:
        return np.nan
    return known[one].corr(known[other], method="spearman")


@functools.cache
def environment() -> Environment:
    """Jinja with this project's words."""
    made = Environment(
        loader=PackageLoader("derm_compress.report", "templates/findings"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (wording.percent, wording.points, wording.spread, wording.listed, wording.words)
    filters += (wording.model, wording.quantizer, wording.criteria_explained)
    made.filters |= {one.__name__: one for one in filters} | {"p": wording.p_value}
    made.globals |= {
        "verdict": wording.verdict,
        "isnan": pd.isna,
        "rank_correlation": rank_correlation,
        "controls": controls,
        "verdicts": verdicts,
        "paper": paper,
        "SURE": SURE,
        "FEW": FEW,
        "POWER": POWER,
        "median": statistics.median,
    }
    return made
