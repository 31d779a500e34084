"""What the project's runs are asked for, their plans, and a project of its own to run them in."""

import shutil
from pathlib import Path

from derm_compress.study import params, plan

ROOT = Path(__file__).parents[1]
NOTEBOOKS = params.read_notebooks(ROOT)
KNOWN = params.known_parameters(NOTEBOOKS)
DEFAULTS = {name: parameter.default for name, parameter in KNOWN.items()}


def read_run(name):
    """The values of params/NAME.yaml."""
    return params.read_params(ROOT / "params" / f"{name}.yaml", KNOWN)


def planned(**values):
    return plan.make_plan(ROOT, NOTEBOOKS, values)


def project(root):
    """A folder with the real notebooks and run files; the package is the installed one."""
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, root / name)
    return root
