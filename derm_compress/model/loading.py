"""Models: loading, anatomy (the one place that knows where blocks, projector and head live), making, exporting."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from derm_compress.errors import DermError
from derm_compress.model import shapes
from derm_compress.model.anatomy import META, blocks
from derm_compress.model.devices import half

TINY = Path(__file__).parent / "tiny_llava"
PICO_BLOCKS = 8
SEVEN_B = "llava-1.5-7b"  # the published shapes by name; no weights come with it
DERIVED = (
    "position_ids",
    "inv_freq",
)  # what old checkpoints hold though it follows from the config
PARTIAL = "derm_compress.safetensors"  # weights of a model that lacks sublayers: a name that no other loader takes
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it names an optional CPU kernel at every import
transformers_logging.set_verbosity_error()  # the loading report is asserted on below, not printed
transformers_logging.disable_progress_bar()


def config_of(name: str):
    """The LlavaConfig of a name that load_base knows; that of the published 7B model without a download."""
    if PurePath(name).name in (SEVEN_B, f"{SEVEN_B}-hf") and not Path(_folder(name)).is_dir():
        return shapes.llava_7b_config()
    config = _config(name, str(TINY) if name in ("tiny", "pico") else _folder(name))
    if name == "pico":
        config.text_config.num_hidden_layers = PICO_BLOCKS
    return config


def _shapes(name: str) -> LlavaForConditionalGeneration:
    """A model on the meta device, counted as fp16."""
    from derm_compress.model import removal

    config = config_of(name)
    with torch.device(META):
        model = LlavaForConditionalGeneration(config).half().eval()
    if absent := getattr(config, "absent_sublayers", ()):
        removal.apply(model, range(len(blocks(model))), absent)
    return model


def load_base(
    name: str, device: str = "cpu", dtype=None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load `tiny`, `pico`, a model folder or a hub id; fp32 on the CPU, fp16 on a GPU; every weight accounted for.

    On the meta device: the model's shapes, and no processor, as nothing can be asked.
    """
    if device == META:
        return _shapes(name), None
    if name == SEVEN_B:
        raise DermError(
            f"model {name}: shapes without weights; set device: meta, or model: llava-hf/{name}-hf"
        )
    dtype = dtype or half(device)
    if device == "cpu":
        torch.set_num_threads(
            1
        )  # on a shared machine threads wait for each other; one also gives the same bytes
    source = str(TINY) if name in ("tiny", "pico") else _folder(name)
    if name == "pico":
        return _pico().to(
            device, dtype if device == "cpu" else None
        ).eval(), AutoProcessor.from_pretrained(source)
    config = _config(name, source)
    absent = getattr(config, "absent_sublayers", ())
    try:
        held = load_file(Path(source) / PARTIAL) if absent else None
        model, told = LlavaForConditionalGeneration.from_pretrained(
            None if absent else source, config=config, state_dict=held,
            dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise DermError(f"model {name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(told["missing_keys"]) + [str(k) for k in told["mismatched_keys"]]
    unused = sorted(name for name in told["unexpected_keys"] if not name.endswith(DERIVED))
    if absent:
        missing, unused = _remove(model, absent, missing, held)
    if missing:
        raise DermError(
            f"model {name}: {len(missing)} weights are missing or of another shape, first {missing[0]}; "
            "they would be random: get a complete checkpoint"
        )
    if unused:
        raise DermError(
            f"model {name}: {len(unused)} weights have no place in its config, first {unused[0]}; mend the config"
        )
    check_expansion(name, config, processor)
    return model.to(device).eval(), processor


def check_expansion(name: str, config, processor: LlavaProcessor) -> None:
    """Refuse a processor that puts another number of image tokens into a prompt than the tower gives features."""
    vision, patch = config.vision_config, processor.patch_size
    tokens = processor.num_additional_image_tokens - (
        processor.vision_feature_select_strategy == "default"
    )
    tokens += (processor.image_processor.crop_size["height"] // patch) ** 2
    given = (vision.image_size // vision.patch_size) ** 2 + (
        config.vision_feature_select_strategy == "full"
    )
    if tokens != given:
        raise DermError(
            f"model {name}: its processor expands to {tokens} tokens a picture, the model gives {given}: mend "
            "patch_size, crop_size or num_additional_image_tokens (1 for LLaVA-1.5) in its processor's config"
        )


def _remove(model, absent, missing: list[str], held: dict) -> tuple[list[str], list[str]]:
    """Removes sublayers; which missing weights the model still needs, and which held ones it has no place for."""
    from derm_compress.model import removal

    removal.apply(model, range(len(blocks(model))), absent)
    needed = model.state_dict().keys()
    return [name for name in missing if name in needed], [
        name for name in held if name not in needed
    ]


def _folder(name: str) -> str:
    """A model folder, read from the project root as data_root is; anything else is a hub id."""
    inside = Path(os.environ.get("DERM_COMPRESS_ROOT") or Path(__file__).parents[2]) / name
    return str(inside) if inside.is_dir() else name


def check_picture_size(processor: LlavaProcessor, images) -> None:
    """Refuse pictures [n, S, S, 3] that the processor would resize: stage 01 prepares them once and for all."""
    if processor is None:
        return
    wanted, found = processor.image_processor.crop_size["height"], images.shape[1]
    if wanted != found:
        raise DermError(
            f"pictures of {found} px, but the model reads {wanted} px: set image_size: {wanted}"
        )


def _config(name: str, source: str):
    """The config of a LLaVA model; DermError for any other."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DermError(
            f"model {name}: no readable config.json there ({str(error).splitlines()[0]})"
        ) from error
    if config.model_type != "llava":
        raise DermError(
            f"model {name}: is a {config.model_type} model; this study needs a LLaVA model (model_type llava)"
        )
    return config


def _pico() -> LlavaForConditionalGeneration:
    """Eight random blocks on the tiny model's shapes, the same every time."""
    config = config_of("pico")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).float()
