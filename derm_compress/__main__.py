"""Compute and report the runs of the study, export its models, carry a run elsewhere."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from derm_compress.errors import DermError

app = typer.Typer(
    help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
Files = Annotated[list[Path], typer.Argument(help="params/NAME.yaml", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="'KEY=VALUE …'", help="over the files' values")
]


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a stage failed, 2 a wrong request, 130 stopped."""
    for name in ("SIGTERM", "SIGHUP"):  # end like Ctrl-C, so that no kernel is left behind
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        app(argv, prog_name="python -m derm_compress")
    except (DermError, PermissionError) as error:
        print(error, file=sys.stderr)
        return 2
    except SystemExit as done:
        return done.code or 0
    return 0


@app.callback()
def begin() -> None:
    """Before every command, and so before the first sum."""
    from derm_compress.study.plan import settle

    settle()


@app.command()
def run(
    params: Files,
    only: Annotated[str | None, typer.Option(metavar="04", help="this stage only")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="04", help="this stage and those after it")
    ] = None,
    sets: Sets = None,
    force: Annotated[
        bool, typer.Option("--force", help="compute even what has not changed")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="only say what is to compute")] = False,
    hours: Annotated[float, typer.Option(help="stop then; the same command goes on later")] = 0,
) -> None:
    """Compute what is missing of the runs of parameter files, and report."""
    from derm_compress.study.params import assignments
    from derm_compress.study.run import run as compute

    if hours and not list_:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 3600 * hours)
    code = compute(params, only, from_, assignments(sets or []), force=force, list_=list_)
    raise typer.Exit(code)


@app.command()
def emit(
    kind: Annotated[str, typer.Argument(help="snakemake or slurm")],
    params: Files,
    sets: Sets = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a node")] = 1,
    gib: Annotated[
        float, typer.Option(min=0, help="usable GiB of each; 0: those here, or Kaggle's")
    ] = 0,
) -> None:
    """Print the runs of parameter files as jobs for a cluster: a Snakefile, or a Slurm script."""
    from derm_compress.study.emit import emit as write
    from derm_compress.study.params import assignments
    from derm_compress.study.preflight import Machine

    machine = Machine("a node", gpus, gib) if gib else None
    print(write(kind, params, assignments(sets or []), machine), end="")


@app.command()
def look(
    data: Annotated[Path, typer.Argument(help="photographs: a folder, a zip archive, or a csv")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="'KEY=VALUE …'", help="what is known: label_column=dx"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run file; else params/NAME.yaml")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="open no picture, foretell no split")
    ] = False,
) -> None:
    """Say what a run would read of photographs, and write its run file; 1 where it would stop."""
    from derm_compress.files import project_root
    from derm_compress.study.look.propose import propose
    from derm_compress.study.params import assignments

    told, runs = propose(data, assignments(sets or []), out, project_root(), quick=quick)
    print(told)
    raise typer.Exit(0 if runs else 1)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="RUN/STAGE[/NAME], without NAME the operating point")
    ],
    path: Path,
    half: Annotated[bool, typer.Option("--half", help="unquantized weights in fp16")] = False,
) -> None:
    """Write a model of a run as an ordinary model folder."""
    from derm_compress.study.plan import find_recipe

    recipe, store = find_recipe(model)
    from derm_compress.evaluate import cards
    from derm_compress.evaluate.export import export_model

    known = cards.facts(recipe, store.root.parent, model.split("/")[0])
    export_model(recipe, store, path, known=known, half=half)
    tell_written(model, path)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="tiny, small, a model folder or a hub id")],
    plan: Annotated[str, typer.Argument(help="published, or a plan's JSON file")],
    count: Annotated[int, typer.Argument(help="how many of the plan's units go")],
    path: Path,
) -> None:
    """Write a model folder without some of its blocks, by a pruning plan."""
    from derm_compress.evaluate.export import prune_folder
    from derm_compress.method.pruning.plan import read_plan

    prune_folder(model, read_plan(plan), count, path)
    tell_written(model, path)


@app.command()
def allocate(
    model: Annotated[str, typer.Argument(help="tiny, small, a model folder or a hub id")],
    path: Path,
    budget: Annotated[float, typer.Option(help="GiB of weights and of what running needs")],
    run: Annotated[str, typer.Option(help="whose pictures decide; without it synthetic ones")] = "",
    ranking: Annotated[str, typer.Option(help="order of removal")] = "perplexity-iterative",
    method: Annotated[str, typer.Option(help="rtn, rtn_symmetric or hqq")] = "rtn",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Write a model within a budget: which blocks go, and how many bits each linear gets."""
    from derm_compress.data import Request, load_dataset, load_source, sample
    from derm_compress.evaluate.allocate import allocate_folder
    from derm_compress.model.loading import config_of
    from derm_compress.study.plan import find_plan

    if run:
        dataset = load_dataset(find_plan(run).made("01_data") / "dataset")
    else:
        size = config_of(model).vision_config.image_size
        dataset, _ = load_source(Request(image_size=size, n_train=24, n_dev=12, n_test=1))
    items, how = sample(dataset.of("train"), 12, 0), {"ranking": ranking, "method": method}
    unseen = sample(dataset.of("dev"), 12, 0)
    allocate_folder(model, path, budget, items, unseen, dataset.images, device=device, **how)
    tell_written(model, path)


def tell_written(model: str, path: Path) -> None:
    """Says what was written, and who cannot open it."""
    from derm_compress.evaluate import cards
    from derm_compress.model import loading

    print(f"{model} -> {path}; README.md there says what it is and how it opens")
    if (path / loading.PARTIAL).exists():
        print(cards.NOT_PLAIN)


@app.command()
def report(runs: Annotated[list[str], typer.Argument(metavar="RUN...")]) -> None:
    """Render reports/RUN again from what is stored."""
    from derm_compress.files import project_root
    from derm_compress.report.render import render, render_index
    from derm_compress.study.plan import find_plan

    for name in runs:
        plan = find_plan(name)
        print(render(plan.run, root=plan.root, artifacts=plan.artifacts))
    render_index(project_root())


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="all that have one, if none is named"),
    ] = None,
    to: Annotated[str, typer.Option(help="the page's name in reports/")] = "index.html",
) -> None:
    """Write a page in reports/: what the reports of these runs say, side by side."""
    from derm_compress.files import project_root
    from derm_compress.report.render import render_index

    print(render_index(project_root(), runs or (), to))


@app.command()
def paper() -> None:
    """Write docs/paper.md: where the paper disagrees with itself."""
    from derm_compress.files import project_root
    from derm_compress.report.paper.page import write

    print(write(project_root()))


@app.command()
def pack(
    run: str,
    path: Path,
    owner: Annotated[str, typer.Option(help="user name on Kaggle")] = "",
    part_mb: Annotated[
        int, typer.Option(min=0, help="in files of so many MB, for unpack; 0: one folder")
    ] = 0,
) -> None:
    """Copy what a run has finished and begun into a Kaggle data set folder, or into parts."""
    from derm_compress.kaggle.carry import pack as copy

    print(*copy(run, path, owner=owner, part_mb=part_mb), f"-> {path}", sep="\n")


@app.command()
def unpack(path: Path) -> None:
    """Take what pack --part-mb has written into this project's artifacts."""
    from derm_compress.kaggle.carry import unpack as take

    print(*take(path), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
