"""What a page says of the machine that made it."""

import pytest

from derm_compress.report.machine import made_on

TWO_CORES = {"cores": 2, "gpu": None}
CUT = {"n_heldout": "39", "sft_seeds": "1", "device": "cpu"}


@pytest.mark.parametrize(
    ("environment", "seconds", "overrides", "said"),
    [
        (TWO_CORES, 481.8, {}, "This run took 8 minutes on 2 CPU cores, without a GPU."),
        ({"cores": 16, "gpu": "Tesla T4"}, 7200, {}, "This run took 2.0 hours on one Tesla T4."),
        (
            TWO_CORES,
            None,
            CUT,
            "It ran on 2 CPU cores, without a GPU. It was cut down from params/small.yaml:"
            " 39 held-out pictures, 1 seed of SFT.",
        ),
    ],
)
def test_a_page_names_the_machine_and_what_was_cut_down(environment, seconds, overrides, said):
    assert made_on(environment, seconds, overrides, "params/small.yaml") == said
