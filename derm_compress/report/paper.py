"""The paper's published numbers as data (arXiv 2507.21976, Tables 1-5), as printed, contradictions and all.

`table(1)` joins by `blocks_removed`, `table(2)` to `table(5)` by `role` or by `variant`: the paper's model of
that role at the depth that a run took for it. Scores are percent, `paper_vram` is "GB" as printed (in
Table 1 it follows the GiB of the fp16 weights). Which depth "5.6B" means is the paper's own contradiction:
Table 4 counts 5.85 B (6 of 32 blocks removed) for the scores that Tables 2 and 3 give to 5.6 B (7 removed).
"""

import pandas as pd

from derm_compress.errors import DermError

BLOCKS = 32
QUESTIONS = {
    "name": "What is the name of the disease?",
    "treatment": "What is the treatment of the disease?",
    "features": "What is the clinical feature of the disease?",
}
_OPERATING = "pruned-{operating}"
_HEALED, _DEEPER_HEALED = _OPERATING + "+sft", "pruned-{deeper}+sft"
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
    2: (  # variant: the healed model; the score before is the same model's without "+sft"
        ("role", "variant", "paper_model", "paper_seconds", "paper_vram", "paper_score_before",
         "paper_score_after"),
        (
            ("operating", _HEALED, "Pruned LLaVA (5.6 B)", (2 * 60 + 42) * 60, 13.2, 62.50, 74.25),
            ("deeper", _DEEPER_HEALED, "Pruned LLaVA (5.2 B)", (2 * 60 + 14) * 60, 10.8, 38.25, 52.25),
        ),
    ),
    3: (
        ("role", "variant", "paper_model", "method", "paper_score", "paper_vram"),
        tuple(
            (role, f"{variant}|{method}4", model, method, score, vram)
            for role, variant, model, awq, bitsandbytes, vram in (
                ("unpruned", "original", "Base LLaVA (7B)", 64.72, 66.25, 4.5),
                ("operating", _HEALED, "Pruned LLaVA (5.6B)", 54.25, 47.25, 3.9),
                ("deeper", _DEEPER_HEALED, "Pruned LLaVA (5.2B)", 36.25, 32.50, 3.7),
            )
            for method, score in (("awq", awq), ("bitsandbytes", bitsandbytes))
        ),
    ),
    4: (
        ("role", "variant", "setting", "paper_params_b", "bits", "paper_score", "paper_ms_per_token",
         "paper_vram"),
        (
            ("unpruned", "original", "Original LLaVA", 7.06, 16, 80.12, 154, 13.4),
            ("operating", _OPERATING, "Pruning Only", 5.85, 16, 62.50, 148, 11.2),
            ("operating", _HEALED, "Pruning and SFT", 5.85, 16, 74.25, 146, 11.2),
            ("unpruned", "original|awq4", "Quantization Only", 7.06, 4, 64.72, 146, 4.5),
            ("operating", _OPERATING + "|awq4", "Prune + Quant", 5.85, 4, 25.00, 122, 3.9),
            ("operating", _HEALED + "|awq4", "Prune + SFT + Quant", 5.85, 4, 54.25, 122, 3.9),
        ),
    ),
    5: (
        ("role", "variant", "setting", "paper_score", "paper_notes"),
        (
            ("operating", _HEALED + "|awq4", "Full pipeline (ours)", 54.25,
             "Activation-aware quant + pruning + sft"),
            ("operating", _HEALED + "|bitsandbytes4", "Bitsandbytes quantization", 47, "7% accuracy drop"),
            ("operating", _OPERATING + "-magnitude+sft|awq4", "Pruning Based on Magnitude Baseline", 50,
             "4% accuracy drop"),
            ("operating", _HEALED + "|rtn4", "Round to neighbour Quantization", 25, "unintelligible output"),
        ),
    ),
}  # fmt: skip


def table(number: int, *, operating: int = 6, deeper: int = 9) -> pd.DataFrame:
    """The paper's Table 1 to 5, a fresh frame; `variant` names a run's models with this many blocks removed.

    What a run calls its own (bits, method, setting, blocks_removed) keeps its name, what the paper measured
    starts with `paper_`. Raises DermError for another number.
    """
    if number not in _TABLES:
        raise DermError(
            f"paper.table: the paper has tables {min(_TABLES)} to {max(_TABLES)}, not {number}"
        )
    columns, rows = _TABLES[number]
    frame = pd.DataFrame(rows, columns=columns)
    if "variant" in frame:
        frame["variant"] = [
            name.format(operating=operating, deeper=deeper) for name in frame["variant"]
        ]
    return frame
