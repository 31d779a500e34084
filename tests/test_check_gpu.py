"""The checks of `make check-gpu`, as far as a CPU can try them."""

import pytest

from tools.check_gpu import Check, Skip, read_checks, rig
from tools.check_gpu.running import LEAST, try_here


def failing(device, folder):
    assert device == "cuda", "no GPU"


def lacking(device, folder):
    import no_such_package  # noqa: F401


def skipping(device, folder):
    raise Skip("why not")


def test_every_check_says_in_a_line_what_it_asserts():
    checks = read_checks()
    assert len(checks) > 15 and len({check.alone for check in checks.values()}) == 2
    for name, check in checks.items():
        said = check.work.__doc__ or ""
        assert said.endswith(".") and "\n" not in said and check.seconds > LEAST, name


@pytest.mark.parametrize("name", ["int4_kernel", "calibrate_7b", "merge_7b", "latency_7b"])
def test_some_of_them_pass_on_a_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rig, "be_t4", lambda *_, **__: None)  # it is for the rest of a process
    told = try_here(read_checks()[name], "cpu", tmp_path)
    assert told["result"] in ("passed", "skipped"), told["says"]
    assert told["result"] == "passed" or name == "int4_kernel"


@pytest.mark.parametrize(
    ("work", "result", "says"),
    [
        (failing, "failed", "AssertionError: no GPU"),
        (lacking, "skipped", "ModuleNotFoundError: No module named 'no_such_package'"),
        (skipping, "skipped", "why not"),
    ],
)
def test_a_result_says_why(work, result, says, tmp_path):
    told = try_here(Check(work, 30, False), "cpu", tmp_path)
    assert (told["result"], told["says"].splitlines()[0]) == (result, says)
