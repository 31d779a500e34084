"""Checks of the CUDA paths, each in a process of its own; results.json goes to $OUT."""

import argparse
import os
import sys
from pathlib import Path

import torch

from derm_compress.files import write_json
from derm_compress.study.plan import environment, settle
from tools.check_gpu import read_checks
from tools.check_gpu.running import run_all, try_here

LINE = "{result:<8} {name:<15} {seconds:>6} s {peak_gib:>6} GiB  {says}"


def main() -> int:
    asked = argparse.ArgumentParser(prog="check_gpu", description=__doc__)
    asked.add_argument("names", nargs="*", metavar="NAME", help="of checks; all if none is named")
    asked.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked.add_argument("--seconds", type=float, default=440, help="that all may take together")
    asked.add_argument("--into", type=Path, help="try one in this process; its result's file")
    told, checks = asked.parse_args(), read_checks()
    settle()
    if unknown := set(told.names) - set(checks):
        asked.error(f"no checks {sorted(unknown)}; there are {', '.join(checks)}")
    chosen = [checks[name] for name in told.names or checks]
    if told.into:
        write_json(told.into, try_here(chosen[0], told.device, told.into.parent))
        return 0
    out = Path(os.environ.get("OUT", "artifacts/check-gpu"))
    where, results = environment(), run_all(chosen, told.device, told.seconds)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", where | {"device": told.device, "results": results})
    for row in results:
        print(LINE.format(**row), *row.get("log", ()), sep="\n    ")
    return int(any(row["result"] == "failed" for row in results))


if __name__ == "__main__":
    sys.exit(main())
