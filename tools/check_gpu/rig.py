"""What checks share: pictures, models, 7B's shapes, and a GPU that can no more than a T4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend
from transformers import AutoModelForImageTextToText

from derm_compress.data import dialogue, synthetic
from derm_compress.method import NF4Grid
from derm_compress.method.quantization import packed
from derm_compress.model import anatomy, devices, loading, prompts, shapes, usage
from derm_compress.model.generation import generate
from derm_compress.model.memory import GIB
from derm_compress.model.recipe import Recipe
from derm_compress.study.needs import Needs
from derm_compress.study.params import known_parameters, read_notebooks, read_params
from derm_compress.study.preflight import KAGGLE
from tools.check_gpu import Skip

ROOT = Path(__file__).parents[2]
KEY = f"00_stage/{64 * '0'}"  # what a Stored's references begin with
FREE = 13.9  # GiB of a T4 that nothing else uses, at least
SLACK = 1.05  # times a plan that may be measured


class Stored:
    """A store of one folder."""

    def __init__(self, root: Path):
        self.root = root

    def resolve(self, ref: str) -> Path:
        return self.root / ref.removeprefix(f"{KEY}/")


def need_gpu(device: str) -> None:
    if device == "cpu":
        raise Skip("needs a GPU")


def has_nf4(device: str) -> bool:
    """Whether bitsandbytes is here and can quantize on the device."""
    try:
        NF4Grid(64).rounded(torch.ones(64, 64, device=device))
    except Exception:  # without its CUDA part it may fail in any way
        return False
    return True


def base(device: str) -> str:
    """What adapters are trained on here: NF4 where it can be."""
    return "nf4" if has_nf4(device) else "half"


def be_t4(device: str, *, capped: bool = False) -> None:
    """From now on in this process: a T4's kernels, and no more memory than it has."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    devices.ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    packed.has_kernel = lambda *_: False
    if capped and device != "cpu":
        free, total = (size / GIB for size in torch.cuda.mem_get_info())
        if free < FREE:
            raise Skip(f"needs {FREE} GiB, {free:.1f} are free")
        torch.cuda.set_per_process_memory_fraction(min(1.0, KAGGLE.gib / total))


def plain_replies(
    model, processor, items, images: np.ndarray, *, batch_size: int, max_new_tokens: int
) -> dict[tuple[str, str], dict]:
    """answers.picture_replies by generate: each batch goes on until its longest answer ends."""
    found = {}
    for kind in dialogue.QUESTIONS:
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            texts = [prompts.prompt(processor, kind)] * len(some)
            pictures = images[[item.row for item in some]]
            inputs = prompts.prepare(processor, texts, pictures, model.device)
            told = zip(
                *generate(model, processor, inputs, max_new_tokens=max_new_tokens), strict=True
            )
            for item, (text, tokens, stopped) in zip(some, told, strict=True):
                found[item.id, kind] = {"answer": text, "tokens": tokens, "stopped": stopped}
    return found


def drawn(n_train: int = 24, n_test: int = 6):
    return synthetic.make(n_train=n_train, n_test=n_test, n_heldout=0, size=72, seed=0)


def tiny_recipe() -> Recipe:
    model, _ = loading.load_base("tiny")
    return Recipe("tiny", anatomy.fingerprint(model), len(anatomy.blocks(model)))


@torch.inference_mode()
def logits(model, processor, data) -> torch.Tensor:
    """What a model says of the last tokens of two prompts, on the CPU in fp32."""
    texts = [prompts.prompt(processor, "features")] * 2
    asked = prompts.prepare(processor, texts, data.images[:2], model.device)
    return model(**asked).logits[:, -4:].float().cpu()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def config_of(name: str = loading.SEVEN_B):
    """(config, processor) of a model's shapes, 7B's by default, with the tiny model's words."""
    config, (_, processor) = loading.config_of(name), loading.check_model("tiny")
    side, processor.patch_size = config.vision_config.image_size, config.vision_config.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    config.image_token_id = processor.image_token_id
    return config, processor


def shaped(device: str, name: str = loading.SEVEN_B, *, blocks: int = 0, place: str = ""):
    """(model, processor) of a model's shapes, of tiny's on a CPU, with random weights at `place`.

    blocks: how many; 0: all.
    """
    config, processor = loading.check_model("tiny") if device == "cpu" else config_of(name)
    config.text_config.num_hidden_layers = blocks or config.text_config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(place or device):
        model = AutoModelForImageTextToText.from_config(config, dtype=devices.half(device))
    usage.reset_peak(device)
    return model.eval().requires_grad_(False), processor


def noise(model, count: int):
    """(items, pictures of noise) of the size that a model reads."""
    side = model.config.vision_config.image_size
    images = np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)
    return drawn(count, 1).of("train"), images


def needs() -> Needs:
    """What kaggle-t4's steps need on one GPU."""
    known = known_parameters(read_notebooks(ROOT))
    values = {name: parameter.default for name, parameter in known.items()}
    return Needs(values | read_params(ROOT / "params/kaggle-t4.yaml", known), shapes.llava_7b())


def within(device: str, planned: float) -> str:
    """Asserts that the peak is within a plan, and within a T4."""
    if device == "cpu":
        return "no plan on a CPU"
    peak = usage.peak_gib(device)
    assert peak <= min(SLACK * planned, KAGGLE.gib), f"{peak:.2f} GiB, {planned:.2f} planned"
    return f"{peak:.2f} of {planned:.2f} GiB planned"
