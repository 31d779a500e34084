"""AutoAWQ 0.2.9's own quantizer on a LLaVA decoder: the reference to measure against (Linux).

Its calibration (texts from a hub) is replaced by the hidden states that multimodal prompts have
before the first block; its choices are kept as this package's scales and clipping.
"""

import contextlib
import copy
import io
import warnings

import torch

from derm_compress.errors import DermError
from derm_compress.method.quantization import calibration
from derm_compress.model import anatomy, removal


class Layers:
    """What AutoAWQ's quantizer asks of a model class."""

    model_type = "llava"

    @staticmethod
    def move_embed(model, device):
        """Nothing to move: inputs and position embeddings are given."""

    @staticmethod
    def get_layers_for_scaling(block, inputs, kwargs):
        """AutoAWQ's own groups for LLaMA."""
        from awq.models.llama import LlamaAWQForCausalLM

        return LlamaAWQForCausalLM.get_layers_for_scaling(block, inputs, kwargs)


def quantizer(model, hidden, *, bits=4, group_size=64, duo=False, clip=True):
    """AutoAWQ's quantizer for hidden states [rows, tokens, width] before the first block.

    Its quantize() scales and clips the blocks' weights in place and leaves the rounding to
    pseudo_quantize_tensor; found_scales [(before, names, s)] and found_clips [{name: shares}] keep
    what it chose, group by group.
    """

    class Quantizer(_imported()):
        def init_quant(self, n_samples, max_seq_len):
            self.found_scales, self.found_clips = [], []
            places = torch.arange(hidden.shape[1], device=hidden.device)[None]
            rope = anatomy.decoder(self.model).rotary_emb(hidden, position_ids=places)
            return anatomy.blocks(self.model), {"position_embeddings": rope}, hidden

        def _search_best_scale(self, *args, **kwargs):
            self.found_scales.append(super()._search_best_scale(*args, **kwargs))
            return self.found_scales[-1]

        def _search_best_clip(self, block, *args):
            found = super()._search_best_clip(block, *args)
            weights = {name: block.get_submodule(name).weight for name, _ in found}
            ends = {name: _ends(weights[name], bound, group_size) for name, bound in found}
            self.found_clips.append(ends)
            return found

    how = {"duo_scaling": duo, "export_compatible": True, "apply_clip": clip}
    return Quantizer(Layers(), model, None, bits, group_size, True, "gemm", None, None, None, **how)


def _imported():
    """AutoAWQ's class; its import says farewell in 20 lines, whatever filters say."""
    with warnings.catch_warnings(record=True):
        try:
            from awq.quantize.quantizer import AwqQuantizer
        except ImportError as error:
            said = f"autoawq cannot be imported here, it is for Linux ({error})"
            raise DermError(f"quantize: {said}") from error
    return AwqQuantizer


def _ends(weight, bound, group_size):
    """Bounds [out, in / g, 1] on |w| as shares [out, in / g, 2] of each group's two ends."""
    groups = weight.float().unflatten(1, (-1, group_size))
    largest = torch.stack([-groups.amin(2), groups.amax(2)], 2).clamp(min=1e-30)
    return (bound.float().to(largest.device) / largest).clamp(max=1).cpu()


def check(model, batches, form):
    """DermError, before anything is computed, for what AutoAWQ's quantizer does not know."""
    if form.block_bits or removal.lacking(model):
        said = "autoawq takes whole blocks at one width, all of them; use awq for exceptions"
        raise DermError(f"quantize: {said}")
    if any(anatomy.groups(block) != anatomy.SEPARATE for block in anatomy.blocks(model)):
        said = "autoawq knows separate projections alone; use awq for fused ones"
        raise DermError(f"quantize: {said}")
    if any("token_weights" in batch for batch in batches):
        said = "autoawq weighs all tokens alike; set answer_weight to 1, or leave autoawq out"
        raise DermError(f"quantize: {said}")


def search(model, batches, form):
    """(tensors, rows) as search_forms() gives them, chosen by AutoAWQ on a copy of the model.

    It knows no padding: every prompt is cut to the shortest one's length.
    """
    model = copy.deepcopy(model)
    hidden = calibration.enter(model, equal_rows(batches))
    how = {"bits": form.bits, "group_size": form.group_size, "duo": form.duo, "clip": form.clip}
    reference = quantizer(model, hidden, **how)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        reference.quantize()
    group_of = {told.linears[0]: group for group, told in anatomy.SEPARATE.items()}
    found, tensors, rows = reference.found_scales, {}, []
    for i, (_, names, s) in enumerate(found):
        block, group = i * len(anatomy.blocks(model)) // len(found), group_of[names[0]]
        tensors[f"{block}.{group}"] = s.float().clone()
        rows.append({"block": block, "group": group, "alpha": None, "loss": None, "loss_rtn": None})
    for block, clips in enumerate(reference.found_clips):
        tensors |= {f"{block}.{name}": shares for name, shares in clips.items()}
    return tensors, rows


def equal_rows(batches):
    """All batches as one without padding: of each row as many tokens as the shortest has."""
    rows, pixels = [], []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [ids[real] for ids, real in zip(batch["input_ids"], mask, strict=True)]
        pixels += [batch["pixel_values"]] if "pixel_values" in batch else []
    batch = {"input_ids": torch.stack([row[: min(map(len, rows))] for row in rows])}
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})
