"""Builds tower and projector of the small model: `python -m tools.small_llava --device cuda`.

A CLIP tower of 4 layers x 192 at 96 px (36 image tokens) and a two-layer projector for
SmolLM2-135M-Instruct, whose weights stay as they are, as in LLaVA's first stage. The tower first
learns the six attributes of synthetic pictures. Both then learn to write them as words: of every
six image tokens one lies where the language model has the word for the picture's count, the next
where it has that for its size, and so on. Last, the projector learns from what the language model
says of pictures. No picture is ever shown with its disease: fine-tuning must have something to
teach.

Half-done parts are kept in artifacts/small_llava, and taken up when the command is run
again with the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from derm_compress.data import synthetic
from derm_compress.files import digest
from derm_compress.method.finetune.train import keep, resume
from derm_compress.model import small
from derm_compress.model.processors import in_parts
from derm_compress.model.prompts import IGNORED, collate, encode
from derm_compress.progress import track
from tools.tiny_llava import bayes_accuracy, picture_conversation, targets, tower_accuracy

SIZE, PATCH, WIDTH, LAYERS = 96, 16, 192, 4
IMAGE_TOKENS = (SIZE // PATCH) ** 2
PARTS = ("vision_tower", "multi_modal_projector")  # what is built here
WORK = Path(os.environ.get("DERM_COMPRESS_ROOT") or ".") / "artifacts" / "small_llava"
SETTINGS = {
    "seed": 0,
    "pictures": 24_000,
    "tower": {"steps": 2200, "batch": 96, "lr": 1e-3},
    "words": {"steps": 900, "batch": 96, "lr": 1e-3},
    "answers": {"steps": 160, "batch": 12, "lr": 1e-3},
}
FEATURES = 8000  # pictures that the projector learns from
HELD = 1024  # pictures that nothing is trained on, to measure with
SHAPES = [SIZE, PATCH, WIDTH, LAYERS]


def processor(tokenizer, template: str) -> LlavaProcessor:
    """CLIP's image preparation at 96 px and the language model's tokenizer."""
    side = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=in_parts(template, tokenizer.image_token),
    )


def config(language_model) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_index=language_model.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )


def drawn(count: int, seed: int) -> tuple[list[dict[str, str]], np.ndarray]:
    """Facts of pictures, attributes independent, and the pictures; drawn by all cores."""
    part = 500
    begins = range(0, count, part)
    draw = partial(_some, seed=seed, part=part)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = list(track(pool.map(draw, begins), "pictures drawn", len(begins)))
    facts = [picture.facts for some, _ in parts for picture in some]
    return facts[:count], np.concatenate([images for _, images in parts])[:count]


def _some(begin: int, *, seed: int, part: int):
    # a picture's random numbers follow from its seed and place, so each part has its own seed
    return synthetic.pictures(part, seed=seed * 100_000 + begin, size=SIZE, diseases=False)


def train(
    what: str,
    loss_of: Callable[[np.random.Generator, int], torch.Tensor],
    weights: dict[str, nn.Parameter],
    *,
    steps: int,
    batch: int,
    lr: float,
) -> float:
    """AdamW with a warm-up and a linear decay, from the kept checkpoint on; seconds it took.

    loss_of(rng, batch) draws a batch.
    """
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    # what was begun with other settings is not gone on with
    path = WORK / f"{what}-{digest([SETTINGS, SHAPES])[:8]}.safetensors"
    curve, told = resume(path, weights, optimizer)
    done = len(curve)
    for step in track(range(done, steps), what, total=steps - done):
        began = time.perf_counter()
        rise, fall = (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(rise, fall)
        loss = loss_of(np.random.default_rng([SETTINGS["seed"], step]), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        curve.append((step, loss.item()))
        told["seconds"] += time.perf_counter() - began
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"{what}, step {step}: loss {loss.item():.4f}", flush=True)
            keep(path, weights, optimizer, curve, told)
    return told["seconds"]


def train_tower(model, pixels, facts, heads: nn.ModuleDict) -> float:
    """Teaches every image token, and all together, to name the six attributes."""
    wanted = targets(facts)

    def loss_of(rng, batch):
        rows = rng.integers(len(facts), size=batch)
        return naming_loss(heads, seen(model, shown(pixels, rows, rng)), wanted, rows)

    return train("tower", loss_of, named(model, "vision_tower") | named(heads), **SETTINGS["tower"])


def shown(pixels, rows, rng) -> torch.Tensor:
    """Pictures, half of the batches mirrored: no attribute knows left from right."""
    found = pixels(rows)
    return found.flip(-1) if rng.random() < 0.5 else found


def naming_loss(heads, tokens, wanted, rows) -> torch.Tensor:
    """Cross entropy of the attributes that the heads name, by each token and by all together."""
    total = 0
    for name, head in heads.items():
        right = wanted[name][rows].to(tokens.device)
        said = head(tokens)
        each = F.cross_entropy(said.transpose(1, 2), right[:, None].expand(-1, IMAGE_TOKENS))
        total = total + (each + F.cross_entropy(said.mean(1), right)) / 2
    return total


def seen(model, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower gives the projector: [n, 36, 192]."""
    tower = model.model.vision_tower
    fast = pixels.device.type == "cuda"  # a CPU gains nothing from it at this width
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=fast):
        states = tower(pixels, output_hidden_states=True).hidden_states
    return states[-1][:, 1:].float()


@torch.no_grad()
def words(model, tokenizer) -> dict[str, torch.Tensor]:
    """What the language model reads for each value of each attribute: [values, width]."""
    table, found = model.get_input_embeddings().weight.float(), {}
    for name, values in synthetic.ATTRIBUTES.items():
        ids = [tokenizer(f" {value}", add_special_tokens=False)["input_ids"] for value in values]
        found[name] = torch.stack([table[row].mean(0) for row in ids])
    return found


def train_on_words(model, pixels, facts, heads, tokenizer) -> float:
    """Image token i lies at the word for attribute i modulo 6; the tower goes on naming them."""
    known, wanted = words(model, tokenizer), targets(facts)
    each = torch.stack([known[name][wanted[name].to(known[name].device)] for name in known], 1)
    place = torch.arange(IMAGE_TOKENS) % len(known)

    def loss_of(rng, batch):
        rows = rng.integers(len(facts), size=batch)
        tokens = seen(model, shown(pixels, rows, rng))
        error = model.model.multi_modal_projector(tokens) - each[rows][:, place]
        return error.square().sum(-1).mean() + naming_loss(heads, tokens, wanted, rows)

    learned = named(model, "vision_tower", "multi_modal_projector") | named(heads)
    return train("words", loss_of, learned, **SETTINGS["words"])


def train_on_answers(model, prepare, features, facts) -> float:
    """Next-token loss on what is said of pictures, by a language model that stays as it is."""
    inner = model.model

    def loss_of(rng, batch):
        rows = rng.integers(len(features), size=batch)
        return answer_loss(model, prepare, features[rows], [facts[row] for row in rows], rng)

    inner.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    learned = named(model, "multi_modal_projector")
    return train("answers", loss_of, learned, **SETTINGS["answers"])


def answer_loss(model, prepare, features, facts, rng) -> torch.Tensor:
    """Mean loss of the answers' tokens, one question a picture."""
    told = [picture_conversation(one, rng)[:1] for one in facts]
    pieces = [encode(prepare, turns, image_tokens=IMAGE_TOKENS) for turns in told]
    batch = collate(pieces, pad=prepare.tokenizer.pad_token_id)
    inputs = {name: part.to(model.device) for name, part in batch.items()}
    with torch.autocast(model.device.type, torch.bfloat16):
        x = model.get_input_embeddings()(inputs["input_ids"])
        spots = (inputs["input_ids"] == model.config.image_token_id)[..., None]
        shown = model.model.multi_modal_projector(features)
        x = x.masked_scatter(spots, shown.to(x.dtype))
        states = model.model.language_model(
            inputs_embeds=x, attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        labels = inputs["labels"][:, 1:]
        asked = labels != IGNORED
        return F.cross_entropy(model.lm_head(states[:, :-1][asked]).float(), labels[asked])


def named(module, *parts: str) -> dict[str, nn.Parameter]:
    """Weights by name, of all or of parts of a LLaVA; without the tower's last, unread norm."""
    found = {}
    for name, weight in module.named_parameters():
        if "post_layernorm" in name:
            continue
        if not parts or name.startswith(tuple(f"model.{part}." for part in parts)):
            found[name] = weight
    return found


class Pixels:
    """Pictures [n, 96, 96, 3] as the tower reads them, some at a time, on the model's device."""

    def __init__(self, prepare: LlavaProcessor, images: np.ndarray, device: str):
        known = prepare.image_processor
        self.images = torch.from_numpy(images)
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (known.image_mean, known.image_std)
        )
        wanted = known(list(images[:1]), return_tensors="pt")["pixel_values"].to(device)
        torch.testing.assert_close(self(slice(1)), wanted, atol=1e-5, rtol=0)

    def __call__(self, rows) -> torch.Tensor:
        shown = self.images[rows].to(self.mean.device).permute(0, 3, 1, 2)
        return (shown / 255 - self.mean) / self.std


def build(folder: Path, device: str) -> None:
    """Trains both and writes them with config, processor, recipe and measured accuracies."""
    torch.manual_seed(SETTINGS["seed"])
    WORK.mkdir(parents=True, exist_ok=True)
    count = SETTINGS["pictures"]
    drawn_facts, images = drawn(count + HELD, SETTINGS["seed"] + 1)
    facts, held_facts = drawn_facts[:count], drawn_facts[count:]
    language_model, _ = small.read_wheel()
    prepare = processor(language_model.tokenizer, language_model.template)
    model = LlavaForConditionalGeneration(config(language_model))
    unknown = model.load_state_dict(language_model.weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"the language model has {unknown[0]}, for which there is no place")
    model.to(device)
    pixels, held_pixels = (
        Pixels(prepare, part, device) for part in (images[:count], images[count:])
    )

    sizes = {name: len(values) for name, values in synthetic.ATTRIBUTES.items()}
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})
    seconds = {"tower": train_tower(model, pixels, facts, heads.to(device))}
    seconds["words"] = train_on_words(model, pixels, facts, heads, prepare.tokenizer)
    with torch.no_grad():
        held = features_of(model, held_pixels, HELD)
        some = features_of(model, pixels, min(count, FEATURES))
        accuracy = tower_accuracy(heads, held, held_facts)
    read = words_read(model, held, held_facts, prepare.tokenizer)
    seconds["answers"] = train_on_answers(model, prepare, some, facts)
    with torch.no_grad():
        rng = np.random.default_rng(SETTINGS["seed"])
        part = slice(64)
        loss = answer_loss(model, prepare, held[part], held_facts[part], rng).item()

    ours = {}
    for name, weight in model.state_dict().items():
        if name.startswith(tuple(f"model.{part}." for part in PARTS)):
            ours[name] = weight.half().cpu().contiguous()
    folder.mkdir(exist_ok=True)
    save_file(ours, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    prepare.save_pretrained(folder)
    for name in set(os.listdir(folder)) - {"model.safetensors", "recipe.json", *small.TOWER}:
        (folder / name).unlink()  # the language model brings its own words and template
    told = {
        "command": f"python -m tools.small_llava --device {device}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": {name: round(value) for name, value in seconds.items()},
        "parameters": sum(weight.numel() for weight in ours.values()),
        "settings": SETTINGS,
        "tower_accuracy": {name: round(share, 3) for name, share in accuracy.items()},
        "words_read": read,
        "answer_loss": round(loss, 3),
        "ceiling_of_diagnosis": round(bayes_accuracy(8000), 3),
    }
    (folder / "recipe.json").write_text(json.dumps(told, indent=1) + "\n")


def features_of(model, pixels: Pixels, count: int) -> torch.Tensor:
    parts = [pixels(slice(start, min(start + 256, count))) for start in range(0, count, 256)]
    return torch.cat([seen(model, part) for part in parts])


@torch.no_grad()
def words_read(model, features, facts, tokenizer) -> dict[str, float]:
    """Share of pictures whose words the projector writes nearest to the right ones."""
    known, right = words(model, tokenizer), {}
    shown = model.model.multi_modal_projector(features)
    place = torch.arange(IMAGE_TOKENS) % len(known)
    for i, (name, wanted) in enumerate(targets(facts).items()):
        nearest = torch.cdist(shown[:, place == i].mean(1), known[name]).argmin(1).cpu()
        right[name] = round((nearest == wanted).float().mean().item(), 3)
    return right


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    if asked.parse_args().device == "cpu":
        torch.set_num_threads(1)
    build(small.SMALL, asked.parse_args().device)
