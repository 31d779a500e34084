"""Whether a chat model fits: what its weights and cache need beside what is free, before anything is loaded."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from derm_compress.errors import DermError
from derm_compress.files import public

GIB = 2**30
SPARE = 0.1  # of the weights, for what a forward pass holds beside them and the cache
FLOATS = {"F64", "F32", "F16", "BF16"}  # are loaded in the type that the model runs in


class Fit(NamedTuple):
    """GiB that a judge needs (weights and cache apart) and that are free where it would run."""

    weights: float
    cache: float
    free: float
    where: str

    @property
    def needed(self) -> float:
        return self.weights * (1 + SPARE) + self.cache

    def says(self, name: str) -> str:
        """Whether it will fit, in one line."""
        parts = f"{self.weights:.2f} GiB of weights and {self.cache:.2f} GiB of cache, {self.needed:.2f} GiB in all"
        verdict = "fits" if self.needed <= self.free else "does not fit"
        return f"judge {name}: {parts}; {self.free:.2f} GiB are free on {self.where}: {verdict}"


def source(model: str) -> dict:
    name, _, revision = (model, "", "") if Path(model).is_dir() else model.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision or "main"}


def fit(model: str, device: str, batch: int, tokens: int) -> Fit:
    """What a model needs, by its config and the headers of its weight files, beside what is free on the device."""
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    with readable(model):
        config = AutoConfig.from_pretrained(**source(model))
        if packed := getattr(
            config, "quantization_config", None
        ):  # AWQ needs a reader that few have installed
            reader = AutoHfQuantizer.from_config(packed, pre_quantized=True)
            reader.validate_environment(device_map=None if device == "cpu" else "auto")
        config = config.get_text_config()
        weights = sum(_bytes(kind, device) * n for kind, n in _counts(model).items())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * _bytes("F16", device) * batch * tokens
    return Fit(weights / GIB, cache / GIB, *_free(device))


def _counts(model: str) -> dict[str, int]:
    """Numbers in a model's weights by type, from their headers: of a folder, of the hub's cache, of the hub."""
    import huggingface_hub as hub

    name, revision = source(model).values()
    with contextlib.suppress(hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        folder = (
            name
            if Path(name).is_dir()
            else hub.snapshot_download(name, revision=revision, local_files_only=True)
        )
        return hub.get_local_safetensors_metadata(folder).parameter_count
    return hub.get_safetensors_metadata(name, revision=revision).parameter_count


def _bytes(kind: str, device: str) -> float:
    """Bytes of one number: floats as the model runs (fp32 on a CPU, 16 bits on a GPU), all else as it is stored."""
    if kind in FLOATS:
        return 4 if device == "cpu" else 2
    digits = re.search(r"\d+", kind)
    return int(digits[0]) / 8 if digits else 1


def _free(device: str) -> tuple[float, str]:
    """Free GiB, and where: the machine's memory, or that of all its GPUs."""
    import psutil
    import torch

    if device == "cpu":
        return psutil.virtual_memory().available / GIB, "this machine"
    if not torch.cuda.is_available():
        raise DermError(
            "judge: device is cuda, but no GPU is to be seen here; set device: cpu, or judge: openai"
        )
    gpus = range(torch.cuda.device_count())
    return sum(
        torch.cuda.mem_get_info(gpu)[0] for gpu in gpus
    ) / GIB, f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}"


@contextlib.contextmanager
def readable(model: str):
    """Turns what a library says about a model that it cannot read into one line."""
    try:
        yield
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DermError(f"judge {public(model)} cannot be loaded: {line}") from None
