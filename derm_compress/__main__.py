"""Command line: run parameter files, export or prune a model, render a report again, carry a study to Kaggle."""

import argparse
import re
import signal
import sys
from pathlib import Path

from derm_compress.errors import DermError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a stage failed, 2 a wrong request, 130 stopped."""
    arguments = parser().parse_args(argv)
    for name in ("SIGTERM", "SIGHUP"):  # end like Ctrl-C, so that no kernel is left behind
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    from derm_compress.study.plan import settle

    settle()
    try:
        return arguments.command(arguments)
    except DermError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="python -m derm_compress", description=__doc__)
    add = commands.add_subparsers(
        required=True, metavar="run | export | prune | report | pack | kaggle"
    ).add_parser
    run = add("run", help="compute what is missing of the runs of parameter files, and report")
    run.add_argument("params", nargs="+", type=Path, help="params/NAME.yaml")
    run.add_argument("--only", metavar="04", help="this stage only")
    run.add_argument("--from", dest="from_", metavar="04", help="this stage and those after it")
    run.add_argument(
        "--set", action="append", default=[], metavar="'KEY=VALUE …'", help="over the files' values"
    )
    run.add_argument(
        "--force", action="store_true", help="compute again, even if nothing has changed"
    )
    run.add_argument(
        "--list", action="store_true", help="only say what is cached and what is to compute"
    )
    run.add_argument(
        "--hours", type=float, default=0, help="stop then, to go on later with the same command"
    )
    run.set_defaults(command=run_command)
    export = add("export", help="write a model of a run as an ordinary model folder")
    export.add_argument("model", help="RUN/STAGE[/NAME], without NAME the operating point")
    export.add_argument("path", type=Path)
    export.add_argument(
        "--half", action="store_true", help="unquantized weights in fp16, as readers of AWQ expect"
    )
    export.set_defaults(command=export_command)
    prune = add("prune", help="write a model folder without some of its blocks, by a pruning plan")
    prune.add_argument("model", help="a model folder, a hub id, or tiny")
    prune.add_argument("plan", help="published, or a plan's JSON file")
    prune.add_argument("count", type=int, help="how many of the plan's units go")
    prune.add_argument("path", type=Path)
    prune.set_defaults(command=prune_command)
    report = add("report", help="render reports/RUN again from what is stored")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.set_defaults(command=report_command)
    pack = add("pack", help="copy what a run has finished and begun into a Kaggle data set folder")
    pack.add_argument("run", metavar="RUN")
    pack.add_argument("path", type=Path)
    pack.set_defaults(command=pack_command)
    kaggle = add("kaggle", help="build the data set and the kernels that go to Kaggle")
    kaggle.add_argument("path", type=Path)
    kaggle.set_defaults(command=kaggle_command)
    for command in (pack, kaggle):
        command.add_argument("--owner", default="INSERT_USERNAME_HERE", help="user name on Kaggle")
    return commands


def assignments(texts: list[str]) -> dict[str, str]:
    """{"a": "1", "b": "two words"} from ["a=1 b=two words"]: a value goes on until the next `name=`."""
    found = {}
    for text in filter(None, re.split(r"\s+(?=\w+=)", " ".join(texts).strip())):
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise DermError(f"--set {text}: write name=value")
        found[name] = value
    return found


def run_command(a) -> int:
    from derm_compress.study.run import run

    if a.hours and not a.list:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 3600 * a.hours)
    return run(a.params, a.only, a.from_, assignments(a.set), a.force, a.list)


def pack_command(a) -> int:
    from derm_compress.kaggle.build import pack

    print(*pack(a.run, a.path, owner=a.owner), f"-> {a.path}", sep="\n")
    return 0


def kaggle_command(a) -> int:
    from derm_compress.kaggle.build import build, describe

    print(describe(build(a.path, owner=a.owner), a.owner))
    return 0


def report_command(a) -> int:
    from derm_compress.report.render import render, render_index
    from derm_compress.study.plan import project_root

    for name in a.runs:
        print(render(name, root=project_root()))
    render_index(project_root())
    return 0


def export_command(a) -> int:
    from derm_compress.study.plan import find_recipe

    recipe, store = find_recipe(a.model)
    from derm_compress.evaluate import cards
    from derm_compress.evaluate.export import export_model

    known = cards.facts(recipe, store.root.parent, a.model.split("/")[0])
    export_model(recipe, store, a.path, known=known, half=a.half)
    return written(a)


def prune_command(a) -> int:
    from derm_compress.evaluate.export import prune_folder
    from derm_compress.method.pruning.plan import read_plan

    prune_folder(a.model, read_plan(a.plan), a.count, a.path)
    return written(a)


def written(a) -> int:
    """Says what was written, and who cannot open it."""
    from derm_compress.evaluate import cards
    from derm_compress.model import loading

    print(f"{a.model} -> {a.path}; README.md there says what it is and how it opens")
    if (a.path / loading.PARTIAL).exists():
        print(cards.NOT_PLAIN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
