"""Runs parameter files: all is checked first, what is missing is computed, progress is shown."""

import contextlib
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.study import jobs, keys, params
from derm_compress.study.execution import Execution, seconds_in, whole
from derm_compress.study.grid import read_points
from derm_compress.study.plan import Plan, git_state, make_plan


def run(
    params_files, only=None, from_=None, sets=None, *, force=False, list_=False, root=None
) -> int:
    """Computes and reports the runs of parameter files; 0 done, 1 a stage failed, 130 stopped.

    only, from_: a stage by name or number; sets: {parameter: text}, over every file.
    """
    root, sets = files.project_root(root), sets or {}
    notebooks = params.read_notebooks(root)
    first = params.select(from_, notebooks)[0]
    stages = [name for name in params.select(only, notebooks) if name >= first]
    asked = [
        (path, plan)
        for path in params_files
        for plan in plan_runs(Path(path), sets, root, notebooks)
    ]
    plans = [plan for _, plan in asked]
    if len({plan.folder for plan in plans}) < len(plans):
        names = ", ".join(plan.run for plan in plans)
        raise DermError(f"two parameter files make one run: {names}")
    if not all(plan.own(stages) for plan in plans):
        raise params.left_out(stages[0])
    for plan in plans if "device" in params.known_parameters(notebooks) else ():
        own = plan.own(stages)
        foresee(plan, own if force or list_ else missing(plan, own), refuse=not list_)
    if list_:
        print(jobs.listed(plans, stages), flush=True)
        return 0
    done, overrides = [], {name: files.public(text) for name, text in sets.items()}
    try:
        for path, plan in asked:
            note = {"params_file": files.public(str(path)), "overrides": overrides}
            done.append(run_one(plan, plan.own(stages), force, note))
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", flush=True)
        return 130
    return 0 if all(done) else 1


def missing(plan: Plan, stages: list[str]) -> list[str]:
    """Those of the stages whose results are not there."""
    return [stage for stage in stages if not plan.store.ready(stage, plan.keys[stage])]


def foresee(plan: Plan, stages: list[str], *, refuse: bool) -> None:
    """Says what stages need of a GPU; DermError, if asked to refuse, for what cannot work."""
    if not stages:
        return
    from derm_compress.study import checks, preflight

    device = plan.values["device"]
    if refuse:
        print(f"{plan.run}: checking what it needs", flush=True)
        checks.check(plan, stages)
    if device == "cuda" or (device == "meta" and not refuse):
        print(preflight.says(plan, stages), flush=True)


def plan_runs(path: Path, sets: dict[str, str], root: Path, notebooks) -> list[Plan]:
    """The runs of a parameter file and what the command line sets over it, checked."""
    known = params.known_parameters(notebooks)
    points = read_points(path, known, params.check_texts(sets, known, "--set"))
    return [make_plan(root, notebooks, point.values, point.swept) for point in points]


def run_one(plan: Plan, stages: list[str], force: bool, note: dict) -> bool:
    """One run: its stages and notes under its lock, its report; of a finished one nothing else."""
    plan.adopt()
    stale = force or outdated(plan, stages)
    if stale:
        with alone(plan, stages):
            if not compute(plan, stages, force, note):
                return False
    render_report(plan, changed=bool(stale))
    return True


@contextlib.contextmanager
def alone(plan: Plan, stages: list[str]):
    """Holds the locks of a run's stages; DermError where another process has one."""
    locks = [plan.folder / ".locks" / stage for stage in stages]
    try:
        for lock in locks:
            if not files.hold(lock):
                advice = "wait for it, or give this one another name"
                raise DermError(f"run {plan.run} is going on in another process: {advice}")
        yield
    finally:
        for lock in locks:
            files.release(lock)


def compute(plan: Plan, stages: list[str], force: bool, note: dict) -> bool:
    """Runs what is outdated and notes it; False where a stage failed."""
    begun = time.monotonic()
    note |= {"run": plan.run, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    if plan.swept:
        note["sweep"] = {name: files.public(value) for name, value in plan.swept.items()}
    for stage in stages if force else ():
        plan.store.discard(stage, plan.keys[stage])
    todo = [stage for stage in outdated(plan, stages) if not borrow(plan, stage)]
    if not Execution(plan, todo).go():
        return False
    for stage in set(stages) - set(todo):
        plan.point(stage, cached=True)
    note |= study_seconds(plan, todo, time.monotonic() - begun)
    files.write_note(plan.folder / "run_info.json", note | {"git": git_state(plan.root)})
    return True


def study_seconds(plan: Plan, executed: list[str], wall: float) -> dict:
    """`seconds` of the whole study and what they are: wall time if every stage was computed."""
    before, keys_ = files.read_note(plan.folder / "run_info.json"), files.digest(plan.keys)
    pointers = {stage: plan.pointer(stage) for stage in plan.notebooks}
    computed = {stage for stage in executed if not pointers[stage].get("cached")}
    if computed == set(pointers):
        seconds, are = wall, "wall time, no stage cached"
    elif before.get("keys") == keys_ and "seconds_are" in before:
        seconds, are = seconds_in(before), before["seconds_are"]
    else:
        seconds = sum(map(seconds_in, pointers.values()))
        are = "sum of the stages' own, some computed before"
    return {"keys": keys_, "seconds": round(seconds, 1), "seconds_are": are}


def outdated(plan: Plan, stages: list[str]) -> list[str]:
    """The stages of which this run lacks the result, or the notebook as it would look today."""
    needed = {earlier for stage in stages for earlier in plan.graph[stage]}
    stale = []
    for stage in plan.notebooks:
        complete = stage in needed.union(stages) and plan.store.ready(stage, plan.keys[stage])
        if stage in stages:
            final = complete and not plan.store.lacking(stage, plan.keys[stage])
            if not (final and shows(plan.pointer(stage), plan, stage, plan.folder)):
                stale.append(stage)
        elif stage in needed and not complete:
            advice = f"add --from {stage[:2]} to compute it, too"
            raise DermError(f"{stage} is not computed with these parameters: {advice}")
    return stale


def shows(pointer: dict, plan: Plan, stage: str, folder: Path) -> bool:
    """Whether a run's folder has the notebook of this result, with today's text and figures."""
    key = plan.keys[stage]
    results = plan.store.manifest(stage, key)["results"]
    now = {"key": key, "results": results, "view": plan.view(stage)}
    return now.items() <= pointer.items() and whole(folder / "notebooks" / f"{stage}.ipynb")


def borrow(plan: Plan, stage: str) -> bool:
    """Takes a finished stage's executed notebook from another run that shares it; no kernel."""
    key = plan.keys[stage]
    if not plan.store.ready(stage, key) or plan.store.lacking(stage, key):
        return False
    for path in sorted((plan.artifacts / "runs").glob(f"*/{stage}.json")):
        if shows(files.read_note(path), plan, stage, path.parent):
            plan.executed(stage).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / "notebooks" / f"{stage}.ipynb", plan.executed(stage))
            plan.point(stage, cached=True)
            return True
    return False


def render_report(plan: Plan, *, changed: bool) -> None:
    """reports/<run>/ and the comparison of all runs, if anything that they show has changed."""
    index, rendered = plan.root / "reports" / plan.run / "index.html", plan.folder / "rendered.json"
    mark = {"looks": files.digest(looks(plan))}
    if not changed and index.exists() and files.read_note(rendered) == mark:
        print(f"nothing has changed: {files.shown(index)}", flush=True)
        return
    pointers = {stage: plan.pointer(stage).get("key") for stage in plan.notebooks}
    if missing := [stage for stage, key in pointers.items() if key != plan.keys[stage]]:
        print(f"no report yet: {', '.join(missing)} not computed", flush=True)
        return
    from derm_compress.report.render import render, render_index

    index = render(plan.run, root=plan.root, artifacts=plan.artifacts, keep=True)
    render_index(plan.root)
    with contextlib.suppress(DermError):  # of a store that is read-only
        files.write_note(rendered, mark)
    print(f"report: {files.shown(index)}", flush=True)


def looks(plan: Plan) -> list:
    """What a report depends on: each stage's result and notebook, and the modules that draw."""
    shown_now = {stage: [plan.keys[stage], plan.view(stage)] for stage in plan.notebooks}
    names = keys.modules_of("report", plan.package)
    modules = keys.reached(names, plan.package, keys.SHOWN)
    templates = keys.data_files(plan.package, {"templates", "paper"})
    return [shown_now, sorted(module.digest for module in modules.values()), templates]
