from dataclasses import replace

import numpy as np
import pytest

from derm_compress.data import items
from derm_compress.errors import DermError

FIRST = items.Item("a", "train", "rosacea", "g", 0, {"site": "face"}, "synthetic")
SECOND = replace(FIRST, id="b", row=1)
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


def test_facts_and_types_survive_the_disk(tmp_path):
    items.save_dataset(tmp_path, items.Dataset((FIRST, SECOND), IMAGES))
    assert items.load_dataset(tmp_path).items == (FIRST, SECOND)
    (tmp_path / "images.safetensors").unlink()
    with pytest.raises(DermError, match=r"images.safetensors is missing"):
        items.load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "a"}, "twice"),
        ({"split": "test"}, "leak"),
        ({"row": 2}, "no picture 2"),
        ({"split": "x"}, "split 'x'"),
    ],
)
def test_a_dataset_refuses_what_would_mislead(change, message):
    with pytest.raises(DermError, match=message):
        items.Dataset((FIRST, replace(SECOND, **change)), IMAGES)
    with pytest.raises(DermError, match="uint8"):
        items.Dataset((FIRST,), IMAGES / 255)
