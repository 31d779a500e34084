"""What a run was made on, and how it was cut down for that, in words."""

from __future__ import annotations

from collections.abc import Mapping

COUNTS = {
    "n_heldout": "held-out pictures",
    "importance_items": "pictures a ranking",
    "importance_draws": "draws",
    "finetune_steps": "steps of fine-tuning",
    "sft_steps": "steps of SFT",
    "sft_seeds": "seeds of SFT",
}


def made_on(
    environment: Mapping, seconds: float | None, overrides: Mapping, params_file: str
) -> str:
    """The machine, the stages' time together, and what the command line set over the run file."""
    gpu, cores = environment.get("gpu"), environment.get("cores")
    machine = f"one {gpu}" if gpu else f"{cores} CPU cores, without a GPU"
    said = f"This run took {spoken(seconds)} on {machine}" if seconds else f"It ran on {machine}"
    fewer = [counted(overrides[name], words) for name, words in COUNTS.items() if name in overrides]
    if fewer:
        said += f". It was cut down from {params_file}: {', '.join(fewer)}"
    return said + "."


def counted(number: str, words: str) -> str:
    """39 held-out pictures, or 1 seed of SFT."""
    return f"{number} {words if number != '1' else words.replace('s ', ' ', 1)}"


def spoken(seconds: float) -> str:
    """8 minutes, or 3.5 hours."""
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
