"""The results of many runs, each once: who computes it, who shares it, what it costs. No torch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from derm_compress.files import public, read_note
from derm_compress.progress import clock
from derm_compress.study.execution import seconds_in
from derm_compress.study.plan import Plan

CACHED = "cached"


@dataclass(frozen=True)
class Job:
    """A stage's result, which the first run that has it computes.

    needs: where the results lie that it reads. seconds: what it took in a run that differs in
    nothing but what is swept (`beside` says in what), 0 where there is none.
    """

    plan: Plan
    stage: str
    needs: tuple[Path, ...]
    seconds: float = 0.0
    beside: str = ""

    @property
    def key(self) -> str:
        return self.plan.keys[self.stage]

    def state(self) -> str:
        """Whether its result is there, or why not, and what it took."""
        fault = self.plan.store.fault(self.stage, self.key)
        if not fault:
            lacks = self.plan.store.lacking(self.stage, self.key)
            return f"{CACHED}, but lacking: asked again" if lacks else CACHED
        why = "" if fault == "absent" else f" ({fault})"
        took = f", {clock(self.seconds)} {self.beside}" if self.seconds else ""
        return f"to compute{why}{took}"


def jobs(plans: Sequence[Plan], stages: Sequence[str]) -> dict[Path, Job]:
    """The results of some stages of some runs by where they lie; what others read comes first."""
    notes = {root: finished(root) for root in {plan.artifacts for plan in plans}}
    found: dict[Path, Job] = {}
    for plan in plans:
        for stage in plan.own(stages):
            place = result_of(plan, stage)
            if place not in found:
                needs = tuple(result_of(plan, earlier) for earlier in plan.graph[stage])
                took = measured(plan, stage, notes[plan.artifacts][stage])
                found[place] = Job(plan, stage, needs, *took)
    return found


def result_of(plan: Plan, stage: str) -> Path:
    return plan.store.own(stage, plan.keys[stage])


def finished(artifacts: Path) -> dict[str, list[dict]]:
    """The notes of all runs that have finished a stage, by stage."""
    found = defaultdict(list)
    for path in sorted(artifacts.glob("runs/*/[0-9]*.json")):
        found[path.stem].append(read_note(path))
    return found


def measured(plan: Plan, stage: str, notes: list[dict]) -> tuple[float, str]:
    """Seconds of the finished result that is most like this one, and in what that differs."""
    own, on_gpu = plan.told(stage), plan.values.get("device") == "cuda"
    best, fewest = (0.0, ""), len(own) + 1
    for note in notes:
        theirs, machine = note.get("parameters", {}), note.get("environment", {})
        differ = sorted(name for name in own if theirs.get(name) != own[name])
        alike = plan.swept.keys() >= set(differ) and bool(machine.get("gpu")) == on_gpu
        if alike and len(differ) < fewest and seconds_in(note):
            others = ", ".join(f"{name}={public(theirs.get(name))}" for name in differ)
            best = seconds_in(note), f"with {others}" if others else "the last time"
            fewest = len(differ)
    return best


def listed(plans: Sequence[Plan], stages: Sequence[str]) -> str:
    """A line for each stage of each run; of several runs, what they share and cost together."""
    found = jobs(plans, stages)
    states = {place: job.state() for place, job in found.items()}
    lines = []
    for plan in plans:
        for stage in plan.own(stages):
            place = result_of(plan, stage)
            owner = found[place].plan
            said = states[place] if owner is plan else f"shared with {owner.run}"
            lines.append(f"{plan.run}  {stage:<24} {plan.keys[stage][:12]}  {said}")
    if len(plans) > 1:
        todo = [job for place, job in found.items() if not states[place].startswith(CACHED)]
        known = [job.seconds for job in todo if job.seconds]
        cost = f"{clock(sum(known))} for {len(known)} of them, the others unknown"
        of = f"{len(plans)} runs, {len(lines)} stages, {len(found)} results"
        lines.append(f"{of}, {len(todo)} to compute: {cost}")
    return "\n".join(lines)
