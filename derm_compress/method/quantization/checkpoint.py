"""Quantized models as folders: written from packed modules, read back by one call on CPU and GPU.

4-bit integers of one group size go to AutoAWQ's GEMM layout (codes.py), NF4 to an ordinary
bitsandbytes checkpoint that plain from_pretrained opens. Everything else (other widths, mixed ones,
hqq) has a layout of its own: beside each linear's name what PackedLinear holds, `codes`, `scales`
and `zeros`, with every linear's grid under quantization_config.modules in config.json. Tensors are
named as on the hub (llava-hf/llava-1.5-7b-hf), which all versions of Transformers and vLLM know.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from derm_compress.errors import DermError
from derm_compress.files import read_json
from derm_compress.method.quantization.codes import from_gemm, to_gemm
from derm_compress.method.quantization.grids import GRIDS, IntegerGrid
from derm_compress.method.quantization.nf4 import NF4Grid
from derm_compress.method.quantization.packed import PackedLinear
from derm_compress.method.quantization.quantize import quantized_linears
from derm_compress.model import anatomy, devices, loading
from derm_compress.model.hf import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
)

OWN = "derm_compress"
# of OWN: names that no other loader takes, which would fill its linears at random
FILES = "packed{suffix}.safetensors"
HUB = {  # names in memory and on the hub; a "vision_model" level exists there alone
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": "vision_tower.vision_model.",
}
UNTOUCHED = [  # modules_to_not_convert in every reader's words
    "language_model.lm_head",
    "lm_head",
    "model.multi_modal_projector",
    "model.vision_tower",
    "multi_modal_projector",
    "vision_tower",
]


def save(model, folder):
    """Write a packed model's weights and config into a folder; returns the layout."""
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "grid")}
    layout = layout_of(packed.values())
    if layout == "autoawq" and len(packed) < linear_count(model):
        layout = "own"  # readers of the other take every linear for packed
    state = model.state_dict()
    if anatomy.tied(model):
        del state[anatomy.HEAD]  # readers make it of the embedding
    match layout:
        case "bitsandbytes":
            config = _bitsandbytes_config(model, packed)
        case "autoawq":
            config = _to_gemm(state, packed)
        case _:
            modules = {_hub_name(name): _described(module) for name, module in packed.items()}
            config = {"quant_method": OWN, "format": 1, "modules": modules}
    if layout != "bitsandbytes":
        config["modules_to_not_convert"] = UNTOUCHED
    named = {_hub_name(name): tensor.contiguous().cpu() for name, tensor in state.items()}
    pattern = {"filename_pattern": FILES} if layout == "own" else {}
    save_torch_state_dict(named, folder, **pattern)
    _save_config(model, config, Path(folder))
    return layout


def layout_of(modules):
    """The layout of packed modules in files; DermError where they have none."""
    grids = {module.grid for module in modules}
    if not grids:
        raise DermError("export: no linear is packed; export the model unpacked")
    for grid in grids:
        if GRIDS.get(grid.kind) is not type(grid):
            said = f"grid {grid.kind!r} is not one of {', '.join(GRIDS)}, so nobody could read it"
            raise DermError(f"export: {said}; export the model unpacked")
        if not grid.layout:
            said = f"grid {grid.kind!r} has no files, as it quantizes while it runs"
            raise DermError(f"export: {said}; export the model before this step")
    layouts = {grid.layout for grid in grids}
    if layouts == {"bitsandbytes"}:
        return "bitsandbytes"
    if "bitsandbytes" in layouts:
        kinds = ", ".join(sorted({grid.kind for grid in grids}))
        raise DermError(f"export: no layout holds {kinds} together; export the model unpacked")
    eights = all(module.out_features % 8 == 0 for module in modules)
    return "autoawq" if layouts == {"autoawq"} and len(grids) == 1 and eights else "own"


def _to_gemm(state, packed):
    """Puts AutoAWQ's tensors into a model's state in place of the packed ones; its config."""
    for name, module in packed.items():
        for own in ("codes", "scales", "zeros"):
            state.pop(f"{name}.{own}", None)
        state |= {f"{name}.{key}": tensor for key, tensor in to_gemm(*module.encoded()).items()}
    size = module.grid.group_size
    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
    return config | {"group_size": size}


def _save_config(model, quantization, folder):
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    told = read_json(path)
    told |= {"architectures": [type(model).__name__], "quantization_config": quantization}
    told["dtype"] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    path.write_text(json.dumps(told, indent=2) + "\n", "utf-8")


def _hub_name(name):
    for inner, outer in HUB.items():
        if name.startswith(inner):
            return outer + name.removeprefix(inner)
    raise AssertionError(f"{name} has no place in a LLaVA checkpoint")


def _memory_name(name):
    for inner, outer in HUB.items():
        if name.startswith(outer):
            return inner + name.removeprefix(outer)
    return name


def _bitsandbytes_config(model, packed):
    grid = next(iter(packed.values())).grid
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=grid.double,
        bnb_4bit_compute_dtype=model.get_input_embeddings().weight.dtype,
        llm_int8_skip_modules=UNTOUCHED,
    )
    return json.loads(config.to_json_string(use_diff=False))


def _described(module):
    return {"kind": module.grid.kind} | asdict(module.grid) | {"shape": list(module.shape)}


def load(path, device="cpu"):
    """(model, processor) of any folder that this package exports, quantized linears packed.

    fp32 on the CPU, fp16 on a GPU, as loading.load_base; every weight accounted for.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise DermError(f"model {path}: no readable config.json there")
    told = read_json(path / "config.json").get("quantization_config")
    if told is None:
        return loading.load_base(str(path), device)
    some = None
    match told["quant_method"]:
        case "bitsandbytes":
            model = _load_bitsandbytes(path, device)
        case "awq":
            _check_gemm(path, told)
            model = _load_packed(path, device, partial(_gemm_modules, told))
        case "derm_compress":
            model = _load_packed(path, device, partial(_own_modules, told))
            some = len(told["modules"])  # the others are whole, or their weights are missing
        case other:
            known = f"this package reads awq, bitsandbytes and {OWN}"
            raise DermError(f"model {path}: quantized by {other!r}; {known}")
    _check_counts(model, path, some or linear_count(model))
    return model.eval(), AutoProcessor.from_pretrained(path)


def _load_bitsandbytes(path, device):
    from bitsandbytes.nn import Linear4bit

    dtype = devices.half(str(device))
    model, info = LlavaForConditionalGeneration.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise DermError(f"model {path}: {len(missing)} weights are missing, first {missing[0]}")
    for weight in model.parameters():
        if weight.is_floating_point():  # no 4-bit codes
            weight.data = weight.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as nf4.NF4Grid.packed says
            module.compute_dtype, module.compute_type_is_set = dtype, True
            state = getattr(module.weight, "quant_state", None)  # none: there are no codes for it
            module.grid = state and NF4Grid(state.blocksize, state.nested)
    return model


def _load_packed(path, device, modules_of):
    """modules_of: takes the quantized linears out of a dict of tensors: {name: PackedLinear}."""
    from accelerate import init_empty_weights

    tensors, dtype = {}, devices.half(str(device))
    for file in sorted(path.glob("*.safetensors")):
        tensors |= {_memory_name(name): tensor for name, tensor in load_file(file).items()}
    made = modules_of(tensors)
    with init_empty_weights():
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = "sdpa"
        model = LlavaForConditionalGeneration(config)
    inside = set()
    for name, module in made.items():
        module.bias = model.get_submodule(name).bias
        inside |= {f"{name}.{own}" for own in module.state_dict()} - {f"{name}.bias"}
        model.set_submodule(name, module)
    rest = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if config.tie_word_embeddings and anatomy.EMBEDDING in rest:
        rest[anatomy.HEAD] = rest[anatomy.EMBEDDING]
    missing, unexpected = model.load_state_dict(rest, strict=False, assign=True)
    if gone := sorted(set(missing) - inside):
        raise DermError(f"model {path}: {len(gone)} weights are missing, first {gone[0]}")
    if unexpected:
        said = f"{len(unexpected)} weights have no place in its config, first {unexpected[0]}"
        raise DermError(f"model {path}: {said}")
    model.tie_weights()
    return model.to(device)


def _check_gemm(path, told):
    """DermError for AutoAWQ's other layouts: other places under the same names."""
    asked = {"version": "gemm", "bits": 4, "zero_point": True}
    found = {key: told.get(key, value) for key, value in asked.items()}
    found["version"] = str(found["version"]).lower()
    if found != asked:
        raise DermError(f"model {path}: AWQ files of {found}; this package reads {asked}")


def _gemm_modules(told, tensors):
    grid, made = IntegerGrid(4, told["group_size"]), {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = {key: tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")}
        made[name] = PackedLinear.of(grid, *from_gemm(parts))
    return made


def _own_modules(told, tensors):
    made = {}
    for hub, form in told["modules"].items():
        name = _memory_name(hub)
        fields = dict(form)
        kind, shape = fields.pop("kind"), fields.pop("shape")
        known = [name for name, grid in GRIDS.items() if hasattr(grid, "decode")]
        if kind not in known:
            said = f"{name} is on grid {kind!r}; this package reads {', '.join(known)}"
            raise DermError(f"model: {said}")
        held = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scales")
        zeros = tensors.pop(f"{name}.zeros", None)
        made[name] = PackedLinear(GRIDS[kind](**fields), shape, *held, zeros)
    return made


def linear_count(model):
    return sum(len(anatomy.linears(block)) for block in anatomy.blocks(model))


def _check_counts(model, path, wanted):
    """Of a file's model so many linears of the decoder are quantized, and none else."""
    for part, count in quantized_linears(model).items():
        expected = wanted if part == "decoder" else 0
        if count != expected:
            said = f"{count} linears of its {part} are quantized, not {expected}"
            raise DermError(f"model {path}: {said}")
