"""Runs parameter files by papermill: everything is checked first, what is missing is computed, progress is shown."""

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.files import hold, public, read_json, release, shown, write_json
from derm_compress.study import keys
from derm_compress.study.execution import Execution
from derm_compress.study.params import check, known_parameters, read_notebooks, read_params, select
from derm_compress.study.plan import Plan, git_state, make_plan, project_root


def run(
    params_files, only=None, from_=None, sets=None, force=False, list_=False, *, root=None
) -> int:
    """Computes and reports the runs of parameter files; the exit code: 0 done, 1 a stage failed, 130 stopped.

    only, from_: a stage by name or number; sets: parameter -> text from the command line, over every file.
    """
    root = project_root(root)
    notebooks = read_notebooks(root)
    first = select(from_, notebooks)[0]
    stages = [name for name in select(only, notebooks) if name >= first]
    plans = [plan_run(Path(path), sets or {}, root, notebooks) for path in params_files]
    if len({plan.folder for plan in plans}) < len(plans):
        raise DermError(
            f"two parameter files make one run: {', '.join(plan.run for plan in plans)}"
        )
    for plan in plans:
        if "methods" in plan.values:
            from derm_compress.study import (
                preflight,
            )  # pandas, which other notebooks may do without

            preflight.foresee(plan, refuse=not list_)
    if list_:
        for plan, stage in [(plan, stage) for plan in plans for stage in stages]:
            fault = plan.store.fault(stage, plan.keys[stage])
            state = (
                "to compute"
                if fault == "absent"
                else f"to compute ({fault})"
                if fault
                else "cached"
            )
            print(f"{plan.run}  {stage:<24} {plan.keys[stage][:12]}  {state}")
        return 0
    notes = [
        {
            "params_file": public(str(path)),
            "overrides": {k: public(v) for k, v in (sets or {}).items()},
        }
        for path in params_files
    ]
    try:
        done = [run_one(plan, stages, force, note) for plan, note in zip(plans, notes, strict=True)]
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", flush=True)
        return 130
    return 0 if all(done) else 1


def plan_run(path: Path, sets: dict[str, str], root: Path, notebooks) -> Plan:
    """A parameter file and what the command line sets over it, checked."""
    known = known_parameters(notebooks)
    values = read_params(path, known)
    if values.get("run") != path.stem:
        raise DermError(
            f"{path}: run is {values.get('run')!r}; a file's run is its name, so write `run: {path.stem}`"
        )
    texts = {
        k: known[k].from_text(v) if k in known and isinstance(v, str) else v
        for k, v in sets.items()
    }
    return make_plan(root, notebooks, values | check(texts, known, "--set"))


def shows(pointer: dict, plan: Plan, stage: str, folder: Path) -> bool:
    """Whether a run's folder has the executed notebook of just this result, with the text and figures of today."""
    same = pointer.get("key") == plan.keys[stage] and pointer.get("view") == plan.view(stage)
    return same and (folder / "notebooks" / f"{stage}.ipynb").exists()


def run_one(plan: Plan, stages, force: bool, note: dict) -> bool:
    """One run under its lock: its stages, its notes, its report."""
    lock, begun = plan.folder / ".lock", time.monotonic()
    if not hold(lock):
        raise DermError(
            f"run {plan.run} is going on in another process: wait for it, or give this one another name"
        )
    try:
        note |= {"run": plan.run, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        plan.adopt()
        stale = outdated(plan, stages, force)
        todo = [stage for stage in stale if not borrow(plan, stage)]
        done = Execution(plan, todo).go()
        if done and stale:
            for stage in set(stages) - set(todo):
                plan.point(stage, cached=True)
            note |= {"git": git_state(plan.root)} | study_seconds(
                plan, todo, time.monotonic() - begun
            )
            write_json(plan.folder / "run_info.json", note)
        if done:
            render_report(plan, changed=bool(stale))
        return done
    finally:
        release(lock)


def study_seconds(plan: Plan, executed: list[str], wall: float) -> dict:
    """`seconds` of the whole study, and what they are: this call's wall time only if it computed every stage."""
    path, same = plan.folder / "run_info.json", {"keys": files.digest(plan.keys)}
    before = read_json(path) if path.exists() else {}
    pointers = {stage: plan.pointer(stage) for stage in plan.notebooks}
    if set(pointers) == {stage for stage in executed if not pointers[stage].get("cached")}:
        return same | {"seconds": round(wall, 1), "seconds_are": "wall time, no stage cached"}
    if before.get("keys") == same["keys"]:
        return same | {name: before[name] for name in ("seconds", "seconds_are")}
    told = sum(pointer.get("seconds") or 0 for pointer in pointers.values())
    return same | {
        "seconds": round(told, 1),
        "seconds_are": "sum of the stages' own, some computed before",
    }


def outdated(plan: Plan, stages, force: bool) -> list[str]:
    """The stages whose result, or whose notebook as it would look today, this run does not have."""
    needed = {earlier for stage in stages for earlier in plan.graph[stage]} - set(stages)
    stale = []
    for stage in stages if force else ():
        plan.store.discard(stage, plan.keys[stage])
    for stage in (name for name in plan.notebooks if name in needed or name in stages):
        complete = plan.store.complete(stage, plan.keys[stage])
        if stage in needed and not complete:
            raise DermError(
                f"{stage} is not computed with these parameters: add --from {stage[:2]} to compute it, too"
            )
        if stage in stages and not (
            complete and shows(plan.pointer(stage), plan, stage, plan.folder)
        ):
            stale.append(stage)
    return stale


def borrow(plan: Plan, stage: str) -> bool:
    """Takes the executed notebook of a finished stage from another run that shares it; no kernel is needed then."""
    if not plan.store.complete(stage, plan.keys[stage]):
        return False
    for path in sorted((plan.artifacts / "runs").glob(f"*/{stage}.json")):
        if shows(read_json(path), plan, stage, path.parent):
            plan.executed(stage).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / "notebooks" / f"{stage}.ipynb", plan.executed(stage))
            plan.point(stage, cached=True)
            return True
    return False


def render_report(plan: Plan, *, changed: bool) -> None:
    """reports/<run>/ and the comparison of all runs, if anything that they show has changed."""
    index = plan.root / "reports" / plan.run / "index.html"
    drawn = keys.reached(keys.modules_of("report", keys.PACKAGE), keys.PACKAGE, keys.SHOWN)
    looks = [
        sorted(module.digest for module in drawn.values()),
        keys.data_files(keys.PACKAGE, {"templates"}),
    ]
    mark = files.digest(
        [{stage: [plan.keys[stage], plan.view(stage)] for stage in plan.notebooks}, looks]
    )
    rendered = plan.folder / "rendered.json"
    if not changed and index.exists() and rendered.exists() and read_json(rendered) == mark:
        print(f"nothing has changed: {shown(index)}", flush=True)
        return
    if missing := [
        stage for stage in plan.notebooks if plan.pointer(stage).get("key") != plan.keys[stage]
    ]:
        print(f"no report yet: {', '.join(missing)} not computed", flush=True)
        return
    from derm_compress.report.render import render, render_index

    place = {} if plan.artifacts == plan.root / "artifacts" else {"artifacts": plan.artifacts}
    render(plan.run, root=plan.root, **place)
    render_index(plan.root)
    write_json(rendered, mark)
    print(f"report: {shown(index)}", flush=True)
