"""The paper's Tables 1 to 5 as printed (arXiv 2507.21976), contradictions and all.

Scores are percent; `paper_vram` is "GB" as printed, which at 16 bits follows the weights' GiB.
Tables 2 to 5 name a model by its role and by what was done to it. Which depth "5.6B" means is the
paper's own contradiction: see docs/paper.md.
"""

from pathlib import Path

import pandas as pd
import yaml

from derm_compress.errors import DermError

BLOCKS = 32
SPEEDUP = 4.2  # what the text alone claims: times faster, and percent less memory
SAVED = {"Discussion": 70, "4.6.1": 71}
MODEL = ("role", "healed", "quantizer")
_TABLES = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text("utf-8"))


def table(number: int) -> pd.DataFrame:
    """The paper's Table 1 to 5, a fresh frame. Raises DermError for another number."""
    if number not in _TABLES:
        raise DermError(f"paper: it has tables 1 to 5, not {number}")
    return pd.DataFrame(_TABLES[number]["rows"], columns=_TABLES[number]["columns"])
