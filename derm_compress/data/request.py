"""What a study asks of a source of labelled pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from derm_compress.data.tables import is_table
from derm_compress.errors import DermError
from derm_compress.files import located


@dataclass(frozen=True)
class Request:
    """Named as notebook 01's parameters; too few images give smaller sets."""

    source: str = "synthetic"
    data_root: Path | None = None  # folder or zip archive of the photographs
    seed: int = 0
    image_size: int = 72
    n_train: int = 1737  # 0: all that are left
    n_dev: int = 0  # taken out of train
    n_test: int = 39
    n_heldout: int = 0
    # photographs
    label_map: Sequence[str] = ()  # "spelling = disease", over what is known
    exclude_labels: Sequence[str] = ()  # "*": all that are unknown
    group_columns: Sequence[str] = ()  # none: those whose name says so
    subgroup_columns: Sequence[str] = ()
    max_unreadable: float = 0.05  # share at which the run stops
    phash_distance: int = 4  # bits by which duplicates may differ
    embedding_distance: float = 0.0  # cosine distance of their thumbnails; 0: not compared
    table: str = ""  # empty: a preset's, or the folder's only csv
    # source folder
    image_column: str = "image"
    image_suffix: str = ""
    label_column: str = "label"
    onehot_columns: Sequence[str] = ()
    # DermNet
    dermatitis: str = "wide"  # narrow, or wide: with atopic dermatitis and eczema

    @classmethod
    def of(cls, parameters: Mapping, *, project: Path = Path()) -> Request:
        """Of a notebook's parameters those that a request has; data_root lies in `project`."""
        names = {field.name for field in fields(cls)} & set(parameters)
        asked = {name: parameters[name] for name in names}
        if asked.get("data_root"):
            asked["data_root"] = located(str(asked["data_root"]), project)
        return cls(**asked)

    @property
    def sizes(self) -> dict[str, int]:
        """Images asked for, by split; those of dev are among train's."""
        names = ("train", "test", "heldout", "dev")
        return {name: getattr(self, f"n_{name}") for name in names}

    def asks(self, name: str) -> bool:
        """Whether a field is another than if nobody had named it."""
        value = getattr(self, name)
        return (tuple(value) if isinstance(value, list) else value) != getattr(Request, name)

    @property
    def root(self) -> Path:
        """Where the photographs are; DermError where there is nothing."""
        if not self.data_root:
            needed = "needs data_root, the folder or zip archive that holds its images"
            raise DermError(f"source {self.source!r} {needed}")
        root = Path(self.data_root)
        if root.is_file() and is_table(root.name):
            advice = f"set data_root to its folder, and table to {root.name}"
            raise DermError(f"data_root {root} is a list of pictures: {advice}")
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            state = "is empty" if root.exists() else "does not exist"
            if root.is_symlink() and not root.exists():
                state = f"is a link to {root.readlink()}, where nothing is"
            advice = "put its images there, or correct data_root"
            raise DermError(f"data folder {root} {state}; {advice}")
        return root
