"""What a study asks of a source of labelled pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from derm_compress.errors import DermError


@dataclass(frozen=True)
class Request:
    """Named as notebook 01's parameters; too few images give smaller sets."""

    source: str
    data_root: Path | None = None  # folder of the photographs
    seed: int = 0
    image_size: int = 72
    n_train: int = 1737  # 0: all that are left
    n_dev: int = 0  # taken out of train
    n_test: int = 39
    n_heldout: int = 0
    # photographs
    exclude_labels: Sequence[str] = ()
    labels: Mapping[str, str] | None = None  # {spelling: disease}; None: those of diseases.yaml
    max_unreadable: float = 0.05  # share at which the run stops
    phash_distance: int = 4  # bits by which duplicates may differ
    embedding_distance: float = 0.0  # cosine distance of their thumbnails; 0: not compared
    # a folder with a csv
    table: str = ""  # the folder's only one
    image_column: str = "image"
    label_column: str = "label"
    group_columns: Sequence[str] | None = None  # None: the usual ones that exist
    # DermNet
    dermatitis: str = "wide"  # narrow, or wide: with atopic dermatitis and eczema

    @classmethod
    def of(cls, parameters: Mapping, **others) -> Request:
        """Of a notebook's parameters those that a request has."""
        names = {field.name for field in fields(cls)} & set(parameters)
        return cls(**{name: parameters[name] for name in names} | others)

    @property
    def sizes(self) -> dict[str, int]:
        """Images asked for, by split; those of dev are among train's."""
        names = ("train", "test", "heldout", "dev")
        return {name: getattr(self, f"n_{name}") for name in names}

    @property
    def root(self) -> Path:
        """The folder of the photographs; DermError where there is none or nothing in it."""
        if not self.data_root:
            needed = "needs data_root, the folder that holds its images"
            raise DermError(f"source {self.source!r} {needed}")
        root = Path(self.data_root)
        if not root.is_dir() or not any(root.iterdir()):
            state = "is empty" if root.is_dir() else "does not exist"
            advice = "put its images there, or correct data_root"
            raise DermError(f"data folder {root} {state}; {advice}")
        return root
