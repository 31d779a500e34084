"""The paper's Tables 1 to 5 as printed (arXiv 2507.21976), contradictions and all.

Scores are percent; `paper_vram` is "GB" as printed, which at 16 bits follows the weights' GiB.
Tables 2 to 5 name a model by its role and by what was done to it. Which depth "5.6B" means is the
paper's own contradiction: see docs/paper.md.
"""

import pandas as pd

from derm_compress.errors import DermError

BLOCKS = 32
SPEEDUP = 4.2  # what the text alone claims: times faster, and percent less memory
SAVED = {"Discussion": 70, "4.6.1": 71}
MODEL = ("role", "healed", "quantizer")
_TABLES = {
    1: (
        ("blocks_removed", "paper_compression", "paper_params_b", "paper_score", "paper_vram"),
        (
            (0, 0, 7.063, 80.12, 13.4),
            (2, 5, 6.659, 73.15, 12.5),
            (4, 10, 6.254, 65.75, 11.7),
            (7, 20, 5.647, 57.25, 10.5),
            (8, 23, 5.444, 49.50, 10.1),
            (9, 26, 5.242, 36.25, 9.7),
            (10, 29, 5.04, 27.25, 9.4),
        ),
    ),
    2: (
        (*MODEL, "paper_model", "paper_seconds", "paper_vram")
        + ("paper_score_before", "paper_score_after"),
        (
            ("operating", True, "", "Pruned LLaVA (5.6 B)", 9720, 13.2, 62.50, 74.25),
            ("deeper", True, "", "Pruned LLaVA (5.2 B)", 8040, 10.8, 38.25, 52.25),
        ),
    ),
    3: (
        (*MODEL, "paper_model", "paper_score", "paper_vram"),
        (
            ("unpruned", False, "awq", "Base LLaVA (7B)", 64.72, 4.5),
            ("unpruned", False, "bitsandbytes", "Base LLaVA (7B)", 66.25, 4.5),
            ("operating", True, "awq", "Pruned LLaVA (5.6B)", 54.25, 3.9),
            ("operating", True, "bitsandbytes", "Pruned LLaVA (5.6B)", 47.25, 3.9),
            ("deeper", True, "awq", "Pruned LLaVA (5.2B)", 36.25, 3.7),
            ("deeper", True, "bitsandbytes", "Pruned LLaVA (5.2B)", 32.50, 3.7),
        ),
    ),
    4: (
        (*MODEL, "setting", "paper_params_b", "paper_score", "paper_ms_per_token", "paper_vram"),
        (
            ("unpruned", False, "", "Original LLaVA", 7.06, 80.12, 154, 13.4),
            ("operating", False, "", "Pruning Only", 5.85, 62.50, 148, 11.2),
            ("operating", True, "", "Pruning and SFT", 5.85, 74.25, 146, 11.2),
            ("unpruned", False, "awq", "Quantization Only", 7.06, 64.72, 146, 4.5),
            ("operating", False, "awq", "Prune + Quant", 5.85, 25.00, 122, 3.9),
            ("operating", True, "awq", "Prune + SFT + Quant", 5.85, 54.25, 122, 3.9),
        ),
    ),
    5: (
        (*MODEL, "criterion", "setting", "paper_score", "paper_notes"),
        (
            ("operating", True, "awq", "", "Full pipeline (ours)", 54.25)
            + ("Activation-aware quant + pruning + sft",),
            ("operating", True, "bitsandbytes", "", "Bitsandbytes quantization", 47)
            + ("7% accuracy drop",),
            ("operating", True, "awq", "magnitude", "Pruning Based on Magnitude Baseline", 50)
            + ("4% accuracy drop",),
            ("operating", True, "rtn", "", "Round to neighbour Quantization", 25)
            + ("unintelligible output",),
        ),
    ),
}


def table(number: int) -> pd.DataFrame:
    """The paper's Table 1 to 5, a fresh frame. Raises DermError for another number."""
    if number not in _TABLES:
        raise DermError(f"paper: it has tables 1 to 5, not {number}")
    columns, rows = _TABLES[number]
    return pd.DataFrame(rows, columns=columns)
