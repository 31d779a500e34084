"""Models: loading, anatomy (the one place that knows where blocks, projector and head live), making, exporting."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from derm_compress import memory
from derm_compress.artifacts import atomic
from derm_compress.errors import DermError
from derm_compress.recipes import Recipe

if TYPE_CHECKING:
    from derm_compress import cards

TINY = Path(__file__).parent / "tiny_llava"
PICO_BLOCKS = 8
META = "meta"  # the device of a model without values: of shapes alone, from which sizes and costs follow
SEVEN_B = "llava-1.5-7b"  # the published shapes by name; no weights come with it
DERIVED = ("position_ids", "inv_freq")  # what old checkpoints hold though it follows from the config
PARTIAL = "derm_compress.safetensors"  # weights of a model that lacks sublayers: a name that no other loader takes

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names an optional CPU kernel at every import
transformers_logging.set_verbosity_error()  # the loading report is asserted on below, not printed
transformers_logging.disable_progress_bar()


def decoder(model: LlavaForConditionalGeneration) -> nn.Module:
    """The LLaMA decoder: embedding, blocks, final norm."""
    return model.model.language_model


def blocks(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """The decoder's transformer blocks, index 0 first."""
    return decoder(model).layers


def finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; its sum says so at once, unless that alone overflows."""
    return bool(tensor.sum().isfinite() or torch.isfinite(tensor).all())


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by name, in the order of their use: seven, fewer where a sublayer was removed."""
    parts = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    asked = [(part, f"{name}_proj") for part, names in parts.items() for name in names]
    found = {f"{part}.{name}": getattr(getattr(block, part), name, None) for part, name in asked}
    return {name: linear for name, linear in found.items() if linear is not None}


def inputs(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """How many inputs each linear of a block has, by name; the same in all blocks that have it."""
    return {name: linear.in_features for block in blocks(model) for name, linear in linears(block).items()}


def parts(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """Vision tower, projector, decoder and head by name."""
    inner = model.model
    tower = {"vision_tower": inner.vision_tower, "projector": inner.multi_modal_projector}
    return tower | {"decoder": inner.language_model, "head": model.lm_head}


def fingerprint(model: LlavaForConditionalGeneration) -> str:
    """16 hex digits of the architecture and of 64 values of every weight: tells two models apart at any size."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = b"" if flat.is_meta else flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample)
    return digest.hexdigest()[:16]


def has_values(model: LlavaForConditionalGeneration) -> bool:
    """Whether there are weights to compute with; a model on the meta device has shapes alone."""
    return model.device.type != META


def let_go(model) -> None:
    """Give back a model's memory though names may still hold it: it is empty and of no use afterwards."""
    for module in list(model.modules()):
        for held in (module._modules, module._parameters, module._buffers):
            held.clear()


def beside(device: str) -> str:
    """Where a second model goes: the second GPU if there is one."""
    return "cuda:1" if device == "cuda" and torch.cuda.device_count() > 1 else device


def spread(model, over: int | None = None, **how) -> None:
    """Blocks over the GPUs, for generation: one T4 holds 7B in fp16 and hardly a batch beside it. In place.

    Nothing happens where one GPU has room enough; over: so many devices, numbered from 0. how: as dispatch_model's.
    """
    if over is None:
        over = torch.cuda.device_count() if model.device.type == "cuda" else 1
        held = sum(weight.nbytes for weight in model.parameters())
        if over < 2 or hasattr(model, "hf_device_map") or 2 * held < torch.cuda.mem_get_info()[1]:
            return
    from accelerate import dispatch_model

    dispatch_model(model, placement(model, over), skip_keys="past_key_values", **how)


def placement(model, over: int) -> dict[str, int]:
    """{module: GPU}: as many blocks on each, what comes before them on the first, what comes after on the last."""
    inner, count = "model.language_model", len(blocks(model))
    first = ["model.vision_tower", "model.multi_modal_projector", f"{inner}.embed_tokens", f"{inner}.rotary_emb"]
    places = {f"{inner}.layers.{i}": i * over // count for i in range(count)}
    return dict.fromkeys(first, 0) | places | dict.fromkeys([f"{inner}.norm", "lm_head"], over - 1)


def half(device: str) -> torch.dtype:
    """What models compute in: fp32 on the CPU; on a GPU fp16, whatever is_bf16_supported says (a T4 emulates it)."""
    return torch.float32 if device == "cpu" else torch.float16


def config_of(name: str):
    """The LlavaConfig of a name that load_base knows; that of the published 7B model without a download."""
    if PurePath(name).name in (SEVEN_B, f"{SEVEN_B}-hf") and not Path(_folder(name)).is_dir():
        return memory.llava_7b_config()
    config = _config(name, str(TINY) if name in ("tiny", "pico") else _folder(name))
    if name == "pico":
        config.text_config.num_hidden_layers = PICO_BLOCKS
    return config


def _shapes(name: str) -> LlavaForConditionalGeneration:
    """A model on the meta device, counted as fp16."""
    from derm_compress import prune

    config = config_of(name)
    with torch.device(META):
        model = LlavaForConditionalGeneration(config).half().eval()
    if absent := getattr(config, "absent_sublayers", ()):
        prune.apply(model, range(len(blocks(model))), absent)
    return model


def load_base(name: str, device: str = "cpu", dtype=None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load `tiny`, `pico`, a model folder or a hub id; fp32 on the CPU, fp16 on a GPU; every weight accounted for.

    On the meta device: the model's shapes, and no processor, as nothing can be asked.
    """
    if device == META:
        return _shapes(name), None
    if name == SEVEN_B:
        raise DermError(f"model {name}: shapes without weights; set device: meta, or model: llava-hf/{name}-hf")
    dtype = dtype or half(device)
    if device == "cpu":
        torch.set_num_threads(1)  # on a shared machine threads wait for each other; one also gives the same bytes
    source = str(TINY) if name in ("tiny", "pico") else _folder(name)
    if name == "pico":
        return _pico().to(device, dtype if device == "cpu" else None).eval(), AutoProcessor.from_pretrained(source)
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
    tokens = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    tokens += (processor.image_processor.crop_size["height"] // patch) ** 2
    given = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    if tokens != given:
        raise DermError(
            f"model {name}: its processor expands to {tokens} tokens a picture, the model gives {given}: mend "
            "patch_size, crop_size or num_additional_image_tokens (1 for LLaVA-1.5) in its processor's config"
        )


def _remove(model, absent, missing: list[str], held: dict) -> tuple[list[str], list[str]]:
    """Removes sublayers; which missing weights the model still needs, and which held ones it has no place for."""
    from derm_compress import prune

    prune.apply(model, range(len(blocks(model))), absent)
    needed = model.state_dict().keys()
    return [name for name in missing if name in needed], [name for name in held if name not in needed]


def _folder(name: str) -> str:
    """A model folder, read from the project root as data_root is; anything else is a hub id."""
    inside = Path(os.environ.get("DERM_COMPRESS_ROOT") or Path(__file__).parent.parent) / name
    return str(inside) if inside.is_dir() else name


def check_picture_size(processor: LlavaProcessor, images) -> None:
    """Refuse pictures [n, S, S, 3] that the processor would resize: stage 01 prepares them once and for all."""
    if processor is None:
        return
    wanted, found = processor.image_processor.crop_size["height"], images.shape[1]
    if wanted != found:
        raise DermError(f"pictures of {found} px, but the model reads {wanted} px: set image_size: {wanted}")


def _config(name: str, source: str):
    """The config of a LLaVA model; DermError for any other."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DermError(f"model {name}: no readable config.json there ({str(error).splitlines()[0]})") from error
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


def materialize(
    recipe: Recipe, store, device: str = "cpu", packed: bool = False, dtype=None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Make the variant of a recipe; `store.resolve(ref)` finds adapter and scale files. Merged, never left as LoRA."""
    from derm_compress import finetune, prune, quantize

    memory.reset_peak(device)  # a GPU has room for one model, and none for what is left of the last
    model, processor = load_base(recipe.base, device, dtype)
    if (found := fingerprint(model)) != recipe.fingerprint:
        raise DermError(f"model {recipe.base}: fingerprint {found}, but the recipe was made for {recipe.fingerprint}")
    kept, absent = tuple(range(len(blocks(model)))), ()
    for step in recipe.steps:
        if rounded := quantize.quantized_linears(model)["decoder"]:
            raise DermError(f"recipe: {step['step']} after a quantize step ({rounded} linears); quantize comes last")
        if device == META and step["step"] in ("adapter", "quantize"):
            continue  # neither changes a shape that is counted here; formats are planned (memory.plan_weights)
        if step["step"] == "adapter":
            finetune.merge_adapter(model, store.resolve(step["ref"]), step, kept=kept, absent=absent)
        elif step["step"] == "prune":
            kept, absent = prune.apply_step(model, step, kept), tuple(step.get("absent", ()))
        elif step["step"] == "quantize":
            quantize.apply_step(model, step, store, packed=packed)
        else:
            raise DermError(f"recipe: unknown step {step['step']!r}; adapter, prune or quantize")
    return model, processor


def export_model(
    recipe_json: str, store, path: Path, packed: bool = True, device: str = "cpu", known: cards.Facts | None = None,
    half: bool = False,
) -> Path:  # fmt: skip
    """Write a model folder and its card (`known`: what it says beside the recipe). Plain `from_pretrained` opens it,
    but for integer grids, which checkpoint.load opens (and, of 4 bits, readers of AWQ), and for absent sublayers, which
    load_base opens (Transformers would fill them with random weights); packed=False writes a quantized variant with
    its dequantized weights instead. half: what is not quantized in fp16, as readers of AWQ expect it; by default it
    stays as it was computed with."""
    check_new(path)
    recipe = Recipe.from_json(recipe_json)
    packed = packed and any(step["step"] == "quantize" for step in recipe.steps)
    model, processor = materialize(recipe, store, device, packed=packed)
    if half:
        to_half(model)
    return write_folder(Path(path), model, processor, recipe, packed=packed, known=known, half=half)


def to_half(model) -> None:
    """Make what is not quantized fp16, in place, and say so in the config; DermError where a weight overflows."""
    model.half()
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.float16
    if large := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise DermError(f"export: {large[0]} overflows torch.float16; export without --half")


def check_new(path: Path) -> None:
    if Path(path).exists() and any(Path(path).iterdir()):
        raise DermError(f"export: {path} exists and is not empty; name a new folder")


def write_folder(
    path: Path, model, processor, recipe: Recipe, *, packed: bool = False, known=None, half: bool = False
) -> Path:
    """A model folder of what a recipe has made, with its card; whole or not at all."""
    from derm_compress import cards  # scores need pandas, which a machine that only rehearses may lack

    with atomic(path) as draft:
        draft.mkdir()
        _save(model, draft, packed)
        processor.save_pretrained(draft)
        card = cards.model_card(recipe, len(blocks(model)), packed, known or cards.Facts(), half)
        (draft / "README.md").write_text(card, encoding="utf-8")
        for inner in draft.rglob("*"):  # safetensors are written for their owner alone
            inner.chmod(0o755 if inner.is_dir() else 0o644)
    return path


def prune_folder(name: str, plan, count: int, path: Path) -> Path:
    """Write a model without the first `count` units of a plan, in the number format it is stored in."""
    from derm_compress import prune

    check_new(path)
    config = config_of(name)
    if getattr(config, "quantization_config", None):
        raise DermError(f"prune: {name} is quantized; prune the model that it was made of, and quantize anew")
    model, processor = load_base(name, dtype=getattr(config, "dtype", None))
    whole = Recipe(name, fingerprint(model), len(blocks(model)))
    plan.check(blocks=whole.blocks, fingerprint=whole.fingerprint)
    prune.apply(model, *prune.left(whole.blocks, plan.removed(count)))
    recipe = whole.pruned(plan.kept(count), plan.absent(count))
    return write_folder(Path(path), model, processor, recipe)


def _save(model, draft: Path, packed: bool) -> None:
    from derm_compress import checkpoint, prune

    absent = prune.lacking(model)
    if absent and packed:
        raise DermError("export: a quantized model without some sublayers has no packed layout; export it unpacked")
    if absent:
        model.config.absent_sublayers = list(absent)
        model.config.save_pretrained(draft)
        model.generation_config.save_pretrained(draft)
        save_model(model, str(draft / PARTIAL))
    elif packed:
        checkpoint.save(model, draft)
    else:
        model.save_pretrained(draft)
