"""Quantized models as folders: written from packed modules, read back by one call on CPU and GPU.

4-bit integers of one group size go to AutoAWQ's GEMM layout (gemm.py), NF4 to an ordinary bitsandbytes checkpoint that
plain from_pretrained opens. Everything else (other widths, mixed ones, hqq) has a layout of its own: beside each
linear's name `codes` (uint8, grids.pack), `scales` (fp16 [out, in / g]) and, unless symmetric, `zeros` (packed like
the codes; fp16 for hqq), with every linear's grid under quantization_config.modules in config.json.
Tensors are named as on the hub (llava-hf/llava-1.5-7b-hf), which all versions of Transformers and vLLM know.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
)

from derm_compress.errors import DermError
from derm_compress.method.quantization import gemm, quantize
from derm_compress.method.quantization.codes import unpack
from derm_compress.method.quantization.grids import HQQGrid, IntegerGrid, NF4Grid
from derm_compress.method.quantization.packed import PackedLinear
from derm_compress.model import anatomy, devices, loading

OWN = "derm_compress"
FILES = "packed{suffix}.safetensors"  # of OWN: names that no other loader takes, which would fill its linears at random
HUB = {  # names in memory and on the hub; a "vision_model" level exists there alone
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": "vision_tower.vision_model.",
}
KINDS = {"integer": IntegerGrid, "hqq": HQQGrid}


def save(model, folder):
    """Write a packed model's weights and config into a folder; models.export_model adds what else belongs there."""
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "grid")}
    grids = {module.grid for module in packed.values()}
    if not packed:
        raise DermError("export: no linear is packed; export the model unpacked")
    if not all(isinstance(grid, IntegerGrid | NF4Grid) for grid in grids):
        raise DermError(
            "export: LLM.int8 quantizes while it runs and has no files; export the model before this step"
        )
    state, skipped = model.state_dict(), _skipped(model, packed)
    if all(isinstance(grid, NF4Grid) for grid in grids):
        config = _bitsandbytes_config(model, next(iter(grids)), skipped)
    elif len(grids) == 1 and _fits_gemm(packed):
        config = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
        config |= {"group_size": next(iter(grids)).group_size, "modules_to_not_convert": skipped}
        _exchange(state, packed, lambda module: gemm.to_gemm(*module.encoded()))
    else:
        told = {_hub_name(f"{name}.")[:-1]: _described(module) for name, module in packed.items()}
        config = {
            "quant_method": OWN,
            "format": 1,
            "modules": told,
            "modules_to_not_convert": skipped,
        }
    named = {_hub_name(name): tensor.contiguous().cpu() for name, tensor in state.items()}
    own = {"filename_pattern": FILES} if config["quant_method"] == OWN else {}
    save_torch_state_dict(named, folder, **own)
    model.config.save_pretrained(folder)
    path = Path(folder) / "config.json"
    told = json.loads(path.read_text("utf-8"))
    told |= {"architectures": [type(model).__name__], "quantization_config": config}
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


def _skipped(model, packed):
    """modules_to_not_convert in every reader's words: parts by both names, and single linears of the decoder."""
    parts = anatomy.parts(model)
    whole = {
        part
        for part, module in parts.items()
        if not any(hasattr(m, "grid") for m in module.modules())
    }
    named = {
        "vision_tower": ["vision_tower", "model.vision_tower"],
        "head": ["lm_head", "language_model.lm_head"],
    }
    named |= {"projector": ["multi_modal_projector", "model.multi_modal_projector"], "decoder": []}
    single = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in packed
    ]
    inside = [name for name in single if name.startswith("model.language_model.")]
    hub = [_hub_name(f"{name}.")[:-1] for name in inside]
    return sorted(word for part in whole for word in named[part]) + inside + hub


def _bitsandbytes_config(model, grid, skipped):
    dtype = model.get_input_embeddings().weight.dtype
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=grid.double,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped,
    )  # fmt: skip
    return json.loads(config.to_json_string(use_diff=False))


def _fits_gemm(packed):
    grids = (module.grid for module in packed.values())
    plain = all(type(grid) is IntegerGrid and grid.bits == 4 for grid in grids)
    return plain and all(module.out_features % 8 == 0 for module in packed.values())


def _exchange(state, packed, make):
    for name, module in packed.items():
        for own in ("codes", "scales", "zeros"):
            state.pop(f"{name}.{own}", None)
        state.update({f"{name}.{key}": tensor for key, tensor in make(module).items()})


def _described(module):
    grid, kind = module.grid, "hqq" if isinstance(module.grid, HQQGrid) else "integer"
    told = {
        "kind": kind,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
    }
    return told | {"shape": list(module.shape)}


def load(path, device="cpu"):
    """(model, processor) of any folder that this package exports, with packed linears where it is quantized.

    fp32 on the CPU, fp16 on a GPU, as models.load_base; every weight accounted for.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise DermError(f"model {path}: no readable config.json there")
    told = json.loads((path / "config.json").read_text("utf-8")).get("quantization_config")
    if told is None:
        return loading.load_base(str(path), device)
    readers = {"bitsandbytes": _load_bitsandbytes, "awq": _load_packed, OWN: _load_packed}
    if told["quant_method"] not in readers:
        raise DermError(
            f"model {path}: quantized by {told['quant_method']!r}; this package reads {sorted(readers)}"
        )
    if told["quant_method"] == "awq":
        _check_gemm(path, told)
    model = readers[told["quant_method"]](path, told, device).eval()
    return model, AutoProcessor.from_pretrained(path)


def _load_bitsandbytes(path, told, device):
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
        weight.data = (
            weight.data.to(dtype) if weight.is_floating_point() else weight.data
        )  # not 4-bit codes
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as grids.NF4Grid.packed says
            module.compute_dtype, module.compute_type_is_set = dtype, True
            state = getattr(
                module.weight, "quant_state", None
            )  # none where the files hold no 4-bit weight
            module.grid = state and NF4Grid(state.blocksize, state.nested)
    keys = [
        key for file in path.glob("*.safetensors") for key in list(safe_open(file, "pt").keys())
    ]
    names = {
        _memory_name(key).removesuffix(".weight.absmax")
        for key in keys
        if key.endswith(".weight.absmax")
    }
    _check_counts(model, path, names, told.get("llm_int8_skip_modules"))
    return model


def _load_packed(path, told, device):
    from accelerate import init_empty_weights

    tensors, dtype = {}, devices.half(str(device))
    for file in sorted(path.glob("*.safetensors")):
        tensors |= {_memory_name(name): tensor for name, tensor in load_file(file).items()}
    tensors |= {
        name: tensor.to(dtype) for name, tensor in tensors.items() if name.endswith(".bias")
    }
    with init_empty_weights():
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = "sdpa"
        model = LlavaForConditionalGeneration(config)
    made = (
        _gemm_modules(tensors, told)
        if told["quant_method"] == "awq"
        else _own_modules(tensors, told)
    )
    for name, module in made.items():
        model.set_submodule(name, module)
    rest = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(rest, strict=False, assign=True)
    inside = {f"{name}.{own}" for name in made for own in ("codes", "scales", "zeros", "bias")}
    if gone := sorted(set(missing) - inside):
        raise DermError(f"model {path}: {len(gone)} weights are missing, first {gone[0]}")
    if unexpected:
        raise DermError(
            f"model {path}: {len(unexpected)} weights have no place in its config, first {unexpected[0]}"
        )
    _check_counts(model, path, set(made), told.get("modules_to_not_convert"))
    return model.to(device)


def _check_gemm(path, told):
    """DermError for files of AutoAWQ's other layouts, whose codes lie elsewhere under the same names."""
    asked = {"version": "gemm", "bits": 4, "zero_point": True}
    found = {key: told.get(key, value) for key, value in asked.items()}
    found["version"] = str(found["version"]).lower()
    if found != asked:
        raise DermError(f"model {path}: AWQ files of {found}; this package reads {asked}")


def _gemm_modules(tensors, told):
    """{name: PackedLinear} of the quantized linears, whose tensors are taken out."""
    grid, made = IntegerGrid(4, told["group_size"]), {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = {key: tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")}
        made[name] = _module(grid, *gemm.from_gemm(parts), tensors.pop(f"{name}.bias", None))
    return made


def _own_modules(tensors, told):
    made = {}
    for hub, form in told["modules"].items():
        name = _memory_name(f"{hub}.")[:-1]
        grid = KINDS[form["kind"]](form["bits"], form["group_size"], form["symmetric"])
        scales, zeros = tensors.pop(f"{name}.scales"), tensors.pop(f"{name}.zeros", None)
        if zeros is not None and not zeros.is_floating_point():
            zeros = unpack(zeros, grid.bits, scales.shape)
        codes = unpack(tensors.pop(f"{name}.codes"), grid.bits, torch.Size(form["shape"]))
        made[name] = _module(grid, codes, scales, zeros, tensors.pop(f"{name}.bias", None))
    return made


def _module(grid, codes, scales, zeros, bias):
    bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return PackedLinear(grid, codes, scales, zeros, bias=bias)


def _check_counts(model, path, names, skipped):
    """The linears that the files hold quantized, `names`, are quantized part by part, and none else.

    Of the decoder only `skipped` may be missing: modules_to_not_convert, by either name, where a config has it.
    """
    counts, place = (
        quantize.quantized_linears(model),
        {module: name for name, module in model.named_modules()},
    )
    for part, module in anatomy.parts(model).items():
        linears = [
            place[m]
            for m in module.modules()
            if hasattr(m, "grid") or isinstance(m, torch.nn.Linear)
        ]
        expected = len(set(linears) & names)
        if part == "decoder" and skipped is not None:
            expected = sum(not _is_skipped(name, skipped) for name in linears)
        if counts[part] != expected or not any(counts.values()):
            raise DermError(
                f"model {path}: {counts[part]} linears of its {part} are quantized, not {expected}"
            )


def _is_skipped(name, skipped):
    ends = [i for i, letter in enumerate(name) if letter == "."] + [len(name)]
    return any(
        name[:i] in skipped or _hub_name(name[:i] + ".")[:-1] in skipped
        for i in ends
        if _is_inside(name[:i])
    )


def _is_inside(name):
    return any(f"{name}.".startswith(inner) for inner in HUB)
