"""AWQ by this package against AutoAWQ 0.2.9's own quantizer: CPU seconds and error.

Two models: the trained tiny one, and a single random block of LLaMA-7B's shapes. Both quantizers
get the same tokens and choose s = s_X^alpha (Eq. 8, 20 alphas) for the same groups; on the tiny
model both also clip, though not alike: AutoAWQ shrinks |w| symmetrically, this package tries both
ends apart. Times run from tokens to rounded fp32 weights; AutoAWQ is spared its packing, this
package computes once what prompts about one picture share. `error` is the relative L2 error on
held-out inputs, of the tiny model's last hidden states (after its final norm) and of the block's
output; `rtn_error` that of plain asymmetric rounding, `ratio` AutoAWQ's seconds over ours. Last
line: one JSON object; a status of 1 if a ratio is below its limit (15 on tiny, 3 on the block), or
our error above theirs or rounding's.
"""

import contextlib
import copy
import io
import json
import os
import statistics
import sys
import time

sys.path.pop(0)  # this folder, whose awq.py would stand before AutoAWQ's package
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from derm_compress.data import synthetic
from derm_compress.method import activations
from derm_compress.method.quantization import calibration
from derm_compress.method.quantization.autoawq import equal_rows, quantizer
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.method.quantization.search import search_forms
from derm_compress.model import anatomy, loading, prompts

BITS, GROUP = 4, 64
PICTURES = 12  # three questions each: what notebook 07 calibrates on by default
TOKENS = 512
LIMITS = {"tiny": 15, "block_7b": 3}  # least ratios


def autoawq(model, tokens, *, clip):
    """Quantize a model in place by AutoAWQ, rounding fp16 weights as its pack() does."""
    hidden = calibration.enter(model, tokens)
    made = quantizer(model, hidden, bits=BITS, group_size=GROUP, clip=clip)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        made.quantize()
    with torch.no_grad():
        for block in anatomy.blocks(model):
            for linear in anatomy.linears(block).values():
                linear.weight.copy_(made.pseudo_quantize_tensor(linear.weight.half())[0])


def ours(model, tokens, *, clip):
    """Quantize a model in place by this package."""
    form = Form("awq", BITS, GROUP, clip=clip)
    scales, _ = search_forms(model, [tokens], {"awq": form})["awq"]
    quantize(model, form, scales=scales)


def compare(model, tokens, held_out, *, clip, last, repeats=5):
    """The figures of one model; AutoAWQ runs once, between our runs, of which the median counts."""
    expected, seconds = output(model, held_out, last), {ours: [], autoawq: []}
    for how in (ours, autoawq, *[ours] * (repeats - 1)):
        made, begun = copy.deepcopy(model), time.process_time()
        how(made, tokens, clip=clip)
        seconds[how].append(time.process_time() - begun)
        if how is autoawq:
            theirs = error(output(made, held_out, last), expected)
    rounded = quantize(copy.deepcopy(model), Form("rtn", BITS, GROUP))
    (their_seconds,), our_seconds = seconds[autoawq], statistics.median(seconds[ours])
    print(f"CPU seconds: AutoAWQ {their_seconds:.2f}, this package {our_seconds:.2f}")
    return {
        "ratio": their_seconds / our_seconds,
        "error": error(output(made, held_out, last), expected),
        "autoawq_error": theirs,
        "rtn_error": error(output(rounded, held_out, last), expected),
    }


def output(model, batches, name):
    """What a module of the decoder writes, [real tokens, channels]."""
    seen, module = [], anatomy.decoder(model).get_submodule(name)
    activations.tap(model, batches, {"": module}, lambda _, x: seen.append(x))
    return torch.cat(seen)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def tiny():
    """The trained tiny model: prompts and answers, cut to one length: AutoAWQ knows no padding."""
    model, processor = loading.load_base("tiny")
    dataset = synthetic.make(n_train=64, n_test=8, n_heldout=16, size=72, seed=3)

    def batches(items):
        how = {"batch_size": 48, "device": "cpu"}
        return list(prompts.calibration_batches(processor, items, dataset.images, **how))

    tokens = equal_rows(batches(dataset.of("train")[:PICTURES]))
    return compare(model, tokens, batches(dataset.of("heldout")), clip=True, last="norm")


def block_7b():
    """One random LLaMA-7B block, 8 channels of each linear's inputs 20 times as loud."""
    text = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 1,
    }
    text |= {"num_attention_heads": 32, "vocab_size": 2000}
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    tower |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=tower)).eval()
    block, loud = anatomy.blocks(model)[0], torch.arange(8) * 499
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"):
        block.get_submodule(name).weight.data[loud] *= 20
    ids = torch.randint(0, 2000, (2, 1, TOKENS))
    tokens, held_out = ({"input_ids": rows} for rows in ids)
    return compare(model, tokens, [held_out], clip=False, last="layers.0", repeats=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"tiny": tiny(), "block_7b": block_7b()}
    print(json.dumps(found))
    missed = [
        name
        for name, told in found.items()
        if told["ratio"] < LIMITS[name]
        or told["error"] > told["autoawq_error"]
        or told["error"] >= told["rtn_error"]
    ]
    sys.exit(1 if missed else 0)
