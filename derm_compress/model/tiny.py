"""Builds the embedded tiny LLaVA: `python -m derm_compress.model.tiny` (one thread and a C++ compiler, about half an hour).

A real LlavaForConditionalGeneration: a CLIP tower of 4 layers x 128 at 72 px (36 image tokens), a two-layer projector,
a LLaMA decoder of 32 blocks x 64. The tower first learns picture attributes and is then frozen; projector and decoder
learn to describe pictures and, from text alone, what is known of the eight diseases. No picture is ever shown with
its disease: fine-tuning must have something to teach.

The decoder starts at a standard deviation of 0.1: at LLaMA's 0.02, blocks this narrow stay almost the identity, and
removing them would show nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from derm_compress.data import dialogue, synthetic
from derm_compress.model.prompts import collate, encode
from derm_compress.progress import track

FOLDER = Path(__file__).parent / "tiny_llava"
SIZE, PATCH, VOCABULARY = 72, 12, 800
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "{% if m['role'] == 'user' %}{{ ' ' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ASKED = {name: f"What is the {name} of the spots?" for name in synthetic.ATTRIBUTES}


def picture_conversation(facts: dict[str, str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """One description and two questions on single attributes, in random order."""
    told = dialogue.picture_answers(facts)
    turns = [("Describe the picture.", told[rng.integers(len(told))])]
    for name in rng.choice(list(ASKED), 2, replace=False):
        turns.append((ASKED[str(name)], f"The {name} is {facts[str(name)]}."))
    return [turns[i] for i in rng.permutation(len(turns))]


def text_conversation(disease: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """What a language model has read of a disease, without any picture: from its name to facts, and back."""
    book = dialogue.book()
    told = {kind: book["diseases"][disease][kind]["answers"] for kind in ("treatment", "features")}
    told["name"] = dialogue.answers(disease, {}, "name")
    kind, hint = (str(k) for k in rng.choice(["treatment", "features"], 2, replace=False))
    known = told[hint][rng.integers(len(told[hint]))]
    turns = [
        (
            f"The patient has {disease}. {dialogue.question(kind)}",
            told[kind][rng.integers(len(told[kind]))],
        ),
        (f"{known} {dialogue.question('name')}", told["name"][rng.integers(len(told["name"]))]),
    ]
    return [turns[i] for i in rng.permutation(2)]


def corpus(n: int, seed: int) -> list[str]:
    """Plain text that the subword tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    names, turns = dialogue.diseases(), []
    for i in range(n):
        facts = synthetic.draw_facts(rng)
        turns += dialogue.conversation(names[i % len(names)], facts, rng)
        turns += picture_conversation(facts, rng) + text_conversation(names[i % len(names)], rng)
    return [f"USER: {q} ASSISTANT: {a}" for q, a in turns]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with LLaVA's special tokens; a beginning-of-sequence token is always put first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
    )


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's image preparation at 72 px and the tokenizer, as one LlavaProcessor."""
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def config(
    vocabulary: int, *, blocks: int = 32, hidden: int = 64, image_token: int = 4
) -> LlavaConfig:
    """Shapes of the tiny model; every linear of the decoder divides by 64, the group size of the study."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )


def image_features(
    model: LlavaForConditionalGeneration, pixels: torch.Tensor, batch: int = 256
) -> torch.Tensor:
    """Outputs of the frozen tower, [n, 36, 128]."""
    tower = model.model.vision_tower
    with torch.no_grad():
        parts = [
            tower(p, output_hidden_states=True).hidden_states[-1][:, 1:]
            for p in pixels.split(batch)
        ]
    return torch.cat(parts)


def train_tower(
    model, pixels, facts, *, steps: int, batch: int, lr: float, seed: int
) -> nn.ModuleDict:
    """Teach every image token to name all six attributes; returns the (discarded) heads."""
    targets = {
        a: torch.tensor([values.index(f[a]) for f in facts])
        for a, values in synthetic.ATTRIBUTES.items()
    }
    heads = nn.ModuleDict({a: nn.Linear(128, len(v)) for a, v in synthetic.ATTRIBUTES.items()})
    tower = model.model.vision_tower
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer, schedule = _optimizer(parameters, lr, steps)
    draw = torch.Generator().manual_seed(seed)
    for step in track(range(steps), "vision tower"):
        rows = torch.randint(len(facts), (batch,), generator=draw)
        tokens = tower(pixels[rows], output_hidden_states=True).hidden_states[-1][
            :, 1:
        ]  # [batch, 36, 128]
        loss = sum(
            F.cross_entropy(
                head(tokens).transpose(1, 2), targets[a][rows, None].expand(-1, IMAGE_TOKENS)
            )
            for a, head in heads.items()
        )
        _step(loss, parameters, optimizer, schedule)
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return heads


def tower_accuracy(model, heads, pixels, facts) -> dict[str, float]:
    """Share of unseen pictures whose attributes the heads name rightly from the mean over image tokens."""
    features = image_features(model, pixels)
    right = {}
    for a, values in synthetic.ATTRIBUTES.items():
        said = heads[a](features).mean(1).argmax(-1)
        right[a] = (said == torch.tensor([values.index(f[a]) for f in facts])).float().mean().item()
    return right


def train_decoder(
    model, tokenizer, features, facts, *, steps: int, batch: int, lr: float, seed: int
) -> None:
    """Next-token loss on the answers; two conversations in three have a picture, the rest are text."""
    inner = model.model
    parameters = [
        *inner.multi_modal_projector.parameters(),
        *inner.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimizer, schedule = _optimizer(parameters, lr, steps)
    rng, names = np.random.default_rng(seed), dialogue.diseases()
    n_text = batch // 3
    for (
        block
    ) in inner.language_model.layers:  # one compiled block serves all 32; about twice as fast
        block.forward = torch.compile(block.forward, dynamic=True)
    for step in track(range(steps), "decoder"):
        rows = rng.integers(len(facts), size=batch - n_text)
        told = [picture_conversation(facts[r], rng) for r in rows]
        told += [text_conversation(names[rng.integers(len(names))], rng) for _ in range(n_text)]
        pieces = [
            encode(tokenizer, t, IMAGE_TOKENS if i < len(rows) else 0) for i, t in enumerate(told)
        ]
        inputs = collate(pieces, pad=tokenizer.pad_token_id)
        embeds = inner.get_input_embeddings()(inputs["input_ids"])
        where = inputs["input_ids"] == model.config.image_token_index
        embeds = embeds.masked_scatter(
            where[..., None], inner.multi_modal_projector(features[rows])
        )
        hidden = inner.language_model(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        kept = inputs["labels"][:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][kept]), inputs["labels"][:, 1:][kept])
        _step(loss, parameters, optimizer, schedule)
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    for block in inner.language_model.layers:
        del block.forward


def _optimizer(parameters, lr, steps):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    return optimizer, schedule


def _step(loss, parameters, optimizer, schedule) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def build(
    folder: Path, *, pictures: int, tower_steps: int, decoder_steps: int, seed: int = 0
) -> None:
    """Train everything and write the model folder with its recipe and measured accuracies."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    tokenizer = train_tokenizer(corpus(2000, seed))
    prepare = processor(tokenizer)
    model = LlavaForConditionalGeneration(config(len(tokenizer)))
    drawn, images = synthetic.pictures(pictures, seed=seed + 1000, diseases=False)
    pixels = prepare.image_processor(list(images), return_tensors="pt")["pixel_values"]
    facts = [p.facts for p in drawn]
    held = len(facts) // 16
    heads = train_tower(
        model, pixels[held:], facts[held:], steps=tower_steps, batch=64, lr=1.5e-3, seed=seed
    )
    accuracy = tower_accuracy(model, heads, pixels[:held], facts[:held])
    print("tower accuracy", accuracy, f"{time.perf_counter() - began:.0f} s", flush=True)
    features = image_features(model, pixels)
    train_decoder(
        model,
        tokenizer,
        features[held:],
        facts[held:],
        steps=decoder_steps,
        batch=24,
        lr=2e-3,
        seed=seed,
    )
    model.half().save_pretrained(folder)
    prepare.save_pretrained(folder)
    told = {
        "command": "python -m derm_compress.model.tiny",
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {
            "pictures": pictures,
            "tower_steps": tower_steps,
            "decoder_steps": decoder_steps,
            "seed": seed,
        },
        "tower_accuracy": {a: round(v, 3) for a, v in accuracy.items()},
        "ceiling_of_diagnosis": round(synthetic.bayes_accuracy(8000), 3),
    }
    (folder / "recipe.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(FOLDER, pictures=8000, tower_steps=900, decoder_steps=1200)
