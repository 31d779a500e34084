"""Shared parts: one arithmetic, no hub, the pico model and a handful of synthetic items."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from folder_store import FolderStore
from hypothesis import HealthCheck, Phase, settings

from derm_compress.study.plan import settle

settle()  # before the first sum, so that processes started by tests sum alike

how = {"database": None, "deadline": None, "phases": [Phase.explicit, Phase.generate, Phase.shrink]}
settings.register_profile("suite", derandomize=True, max_examples=25, **how)
settings.register_profile("long", max_examples=2000, suppress_health_check=list(HealthCheck), **how)
settings.load_profile("suite")  # pytest --hypothesis-profile long asks more

LONG = ("test_smoke", "test_study", "test_checkpoint", "test_finetune", "test_small_smoke")


def pytest_collection_modifyitems(items):
    """Two processes take file after file: the longest first, so that neither waits long."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def dataset():
    from derm_compress.data import synthetic

    return synthetic.make(n_train=24, n_test=8, n_heldout=8, size=72, seed=3)


@pytest.fixture
def pico():
    """A fresh (model, processor): 8 random blocks on the tiny model's shapes."""
    import torch

    from derm_compress.model import loading

    torch.set_num_threads(1)
    return loading.load_base("pico")


@pytest.fixture
def recipe(pico):
    from derm_compress.model import anatomy
    from derm_compress.model.recipe import Recipe

    return Recipe("pico", anatomy.fingerprint(pico[0]), len(anatomy.blocks(pico[0])))


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)
