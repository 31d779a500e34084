"""Loading a LLaVA by name, every weight accounted for, or its shapes alone."""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePath

import torch
from safetensors.torch import load_file

from derm_compress.errors import DermError, first_line
from derm_compress.files import located
from derm_compress.model import anatomy, prompts, removal, shapes, small
from derm_compress.model.anatomy import META, blocks, has_values
from derm_compress.model.devices import half
from derm_compress.model.hf import (
    AutoConfig,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from derm_compress.model.hf import logging as transformers_logging
from derm_compress.model.processors import read_processor

TINY = Path(__file__).parent / "tiny_llava"
PACKAGED = {"tiny": TINY, "small": small.SMALL, "pico": TINY}  # at least their configs
PICO_BLOCKS = 8  # random ones on the tiny model's shapes
SEVEN_B = "llava-1.5-7b"  # the published shapes by name; no weights come with it
LICENCE = "LICENSE"  # in a model folder, and in all that is made of it
PARTIAL = "derm_compress.safetensors"  # of a model that lacks sublayers, for this loader alone
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
DERIVED = ("position_ids", "inv_freq")  # in old checkpoints, though they follow from the config

# bitsandbytes names an optional CPU kernel at every import; what Transformers says is checked here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_base(
    name: str, device: str = "cpu", dtype=None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load `tiny`, `small`, `pico`, a model folder or a hub id; fp32 on the CPU, fp16 on a GPU.

    What does not fit is refused before a weight is read. On the meta device: the model's shapes,
    and no processor, as nothing can be asked.
    """
    if device == META:
        return _of_shapes(name), None
    if device == "cpu" and dtype != torch.float16:  # which is computed on a GPU, block by block
        # threads of a shared machine wait for each other; one also gives the same bytes
        torch.set_num_threads(1)
    config, processor = check_model(name)
    how = {"dtype": dtype or half(device), "device": device}
    model = _pico(config) if name == "pico" else _stored(name, config, **how)
    # a folder's own may hold what is not greedy, such as a penalty on repetition
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=prompts.ends(processor),
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return model.to(device=device, dtype=dtype).eval(), processor


def is_here(name: str) -> bool:
    """Whether a name says a folder, or what can be none: anything but a hub id."""
    return Path(_source(name)).is_dir() or not HUB_ID.fullmatch(name)


def check_model(name: str) -> tuple:
    """(config, processor) of a model that load_base can load; DermError where it cannot."""
    if name == SEVEN_B:
        raise DermError(
            f"model {name}: shapes without weights; set device: meta, or model: llava-hf/{name}-hf"
        )
    config = _read_config(name)
    return config, read_processor(name, _whole(name), config)


def with_values(model, processor) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The pair itself, or pico's where the model has shapes alone: something to show a step on."""
    return (model, processor) if has_values(model) else load_base("pico")


def config_of(name: str):
    """The LlavaConfig of a name that load_base knows; the published model's without a download."""
    published = PurePath(name).name in (SEVEN_B, f"{SEVEN_B}-hf")
    if published and not Path(_source(name)).is_dir():
        return shapes.llava_7b_config()
    return _read_config(name)


def licence_of(name: str) -> Path | None:
    """The licence file in a model's own folder, if it has one."""
    file = Path(_whole(name), LICENCE)
    return file if file.is_file() else None


def _source(name: str) -> str:
    """A model folder, from the project's root as data_root is; anything else is a hub id."""
    if name in PACKAGED:
        return str(PACKAGED[name])
    inside = located(name)
    return str(inside) if inside.is_dir() else name


def _whole(name: str) -> str:
    """Where all of a model is; the small one is made first."""
    return str(small.model_folder()) if name == "small" else _source(name)


def _read_config(name: str):
    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # other people's files hold anything
        if Path(source).is_dir():
            said = f"no readable config.json there ({first_line(error)})"
        elif HUB_ID.fullmatch(name):
            said = f"no folder has this name, nor a model that the hub gives ({first_line(error)})"
        else:
            known = ", ".join(PACKAGED)
            said = f"there is no such folder; a model is {known}, a folder or a hub's OWNER/NAME"
        raise DermError(f"model {name}: {said}") from error
    if config.model_type != "llava":
        raise DermError(
            f"model {name}: is a {config.model_type} model; "
            "this study needs a LLaVA model (model_type llava)"
        )
    anatomy.check(name, config)
    if name == "pico":
        config.text_config.num_hidden_layers = PICO_BLOCKS
    return config


def _of_shapes(name: str) -> LlavaForConditionalGeneration:
    """A model on the meta device, counted as fp16."""
    config = config_of(name)
    model = shapes.built(config).half().eval()
    if absent := getattr(config, "absent_sublayers", ()):
        removal.apply(model, range(len(blocks(model))), absent)
    return model


def _pico(config) -> LlavaForConditionalGeneration:
    """Random blocks, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).float()


def _stored(name: str, config, *, dtype, device: str) -> LlavaForConditionalGeneration:
    """A checkpoint, read tensor by tensor onto its device, so that the host never holds it whole.

    DermError where a weight would be left random or unused.
    """
    source = _whole(name)
    absent = getattr(config, "absent_sublayers", ())
    try:
        partial = load_file(Path(source) / PARTIAL) if absent else None
        model, told = LlavaForConditionalGeneration.from_pretrained(
            None if absent else source,
            config=config,
            state_dict=partial,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # other people's files hold anything
        raise DermError(f"model {name}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(told["missing_keys"]) + [str(key) for key in told["mismatched_keys"]]
    unused = sorted(key for key in told["unexpected_keys"] if not key.endswith(DERIVED))
    if absent:
        removal.apply(model, range(len(blocks(model))), absent)
        needed = model.state_dict().keys()
        missing = [key for key in missing if key in needed]
        unused = [key for key in partial if key not in needed]
    if missing:
        raise DermError(
            f"model {name}: {len(missing)} weights are missing or of another shape, "
            f"first {missing[0]}; they would be random: get a complete checkpoint"
        )
    if unused:
        raise DermError(
            f"model {name}: {len(unused)} weights have no place in its config, "
            f"first {unused[0]}; mend the config"
        )
    return model
