"""Runs of this project that compute nothing: what their parameters are, and their plans."""

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
