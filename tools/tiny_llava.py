"""Builds the embedded tiny LLaVA: `python tools/tiny_llava.py`, half an hour in one thread.

A real LlavaForConditionalGeneration: a CLIP tower of 4 layers x 128 at 72 px (36 image tokens), a
two-layer projector, a LLaMA decoder of 32 blocks x 64. The tower first learns picture attributes
and is then frozen; projector and decoder learn to describe pictures and, from text alone, what is
known of the eight diseases. No picture is ever shown with its disease: fine-tuning must have
something to teach.

The decoder starts at a standard deviation of 0.1: at LLaMA's 0.02, blocks this narrow stay almost
the identity, and removing them would show nothing. Training the decoder compiles a block, which
takes a C++ compiler.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
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
from derm_compress.model.loading import TINY
from derm_compress.model.prompts import IGNORED, collate, encode
from derm_compress.progress import track

SIZE, PATCH, TOWER_WIDTH, VOCABULARY = 72, 12, 128, 800
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
    turns = [("Describe the picture.", _one_of(dialogue.picture_answers(facts), rng))]
    for name in map(str, rng.choice(list(ASKED), 2, replace=False)):
        turns.append((ASKED[name], f"The {name} is {facts[name]}."))
    return [turns[i] for i in rng.permutation(len(turns))]


def text_conversation(disease: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """What a language model has read of a disease: from its name to facts, and back."""
    told = {kind: dialogue.answers(disease, {}, kind) for kind in ("name", "treatment", "features")}
    kind, hint = map(str, rng.choice(["treatment", "features"], 2, replace=False))
    known = _one_of(told[hint], rng)
    asked = f"The patient has {disease}. {dialogue.question(kind)}"
    forth = asked, _one_of(told[kind], rng)
    back = f"{known} {dialogue.question('name')}", _one_of(told["name"], rng)
    turns = [forth, back]
    return [turns[i] for i in rng.permutation(2)]


def _one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]


def corpus(n: int, seed: int) -> list[str]:
    """Plain text that the subword tokenizer is trained on."""
    rng, turns = np.random.default_rng(seed), []
    names = dialogue.diseases()
    for i in range(n):
        name, facts = names[i % len(names)], synthetic.draw_facts(rng)
        turns += dialogue.conversation(name, facts, rng)
        turns += picture_conversation(facts, rng)
        turns += text_conversation(name, rng)
    return [f"USER: {question} ASSISTANT: {answer}" for question, answer in turns]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with LLaVA's special tokens; <s> is always put first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
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
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def config(vocabulary: int) -> LlavaConfig:
    """Shapes of the tiny model; the decoder's linears divide by 64, the study's group size."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )


def _train(what: str, loss_of, parameters, *, steps: int, lr: float) -> None:
    """AdamW with a warm-up; loss_of() draws a batch."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in track(range(steps), what):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{what}, step {step}: loss {loss.item():.4f}", flush=True)


def _seen(model, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower gives the projector: [n, 36, 128]."""
    tower = model.model.vision_tower
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def targets(facts: Sequence[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Index of each attribute's value: [pictures]."""
    found = {}
    for name, values in synthetic.ATTRIBUTES.items():
        found[name] = torch.tensor([values.index(one[name]) for one in facts])
    return found


def train_tower(model, pixels, facts, *, steps: int, batch: int, seed: int) -> nn.ModuleDict:
    """Teach every image token to name all six attributes; returns the (discarded) heads."""
    wanted_of, draw = targets(facts), torch.Generator().manual_seed(seed)
    sizes = {name: len(values) for name, values in synthetic.ATTRIBUTES.items()}
    heads = nn.ModuleDict({name: nn.Linear(TOWER_WIDTH, size) for name, size in sizes.items()})

    def loss_of():
        rows = torch.randint(len(facts), (batch,), generator=draw)
        tokens, total = _seen(model, pixels[rows]), 0
        for name, head in heads.items():
            wanted = wanted_of[name][rows, None].expand(-1, IMAGE_TOKENS)
            total = total + F.cross_entropy(head(tokens).transpose(1, 2), wanted)
        return total

    learned = [*model.model.vision_tower.parameters(), *heads.parameters()]
    _train("vision tower", loss_of, learned, steps=steps, lr=1.5e-3)
    return heads


def tower_accuracy(heads, features, facts) -> dict[str, float]:
    """Share of pictures whose attributes the heads name rightly from the mean over image tokens."""
    right = {}
    for name, wanted in targets(facts).items():
        said = heads[name](features).mean(1).argmax(-1).cpu()
        right[name] = (said == wanted).float().mean().item()
    return right


def train_decoder(model, processor, features, facts, *, steps: int, batch: int, seed: int) -> None:
    """Next-token loss on the answers; two conversations in three have a picture, others none."""
    inner, n_text = model.model, batch // 3
    rng, names = np.random.default_rng(seed), dialogue.diseases()

    def loss_of():
        rows = rng.integers(len(facts), size=batch - n_text)
        shown = [picture_conversation(facts[row], rng) for row in rows]
        read = [text_conversation(names[rng.integers(len(names))], rng) for _ in range(n_text)]
        pieces = [encode(processor, turns, image_tokens=IMAGE_TOKENS) for turns in shown]
        pieces += [encode(processor, turns, image_tokens=0) for turns in read]
        inputs = collate(pieces, pad=processor.tokenizer.pad_token_id)
        x = inner.get_input_embeddings()(inputs["input_ids"])
        spots = (inputs["input_ids"] == model.config.image_token_index)[..., None]
        x = x.masked_scatter(spots, inner.multi_modal_projector(features[rows]))
        out = inner.language_model(
            inputs_embeds=x, attention_mask=inputs["attention_mask"], use_cache=False
        )
        labels = inputs["labels"][:, 1:]
        kept = labels != IGNORED
        return F.cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][kept]), labels[kept])

    learned = [inner.multi_modal_projector, inner.language_model, model.lm_head]
    for block in inner.language_model.layers:
        block.forward = torch.compile(
            block.forward, dynamic=True
        )  # one serves all 32; twice as fast
    parameters = [weight for module in learned for weight in module.parameters()]
    _train("decoder", loss_of, parameters, steps=steps, lr=2e-3)
    for block in inner.language_model.layers:
        del block.forward


def bayes_accuracy(n: int, seed: int = 0) -> float:
    """Accuracy of the best possible diagnosis from perfectly seen attributes: a ceiling."""
    rng = np.random.default_rng(seed)
    names = list(synthetic.DISEASES)
    right = 0
    for i in range(n):
        truth = names[i % len(names)]
        facts = synthetic.draw_facts(rng, truth)
        likelihoods = [_log_likelihood(facts, name) for name in names]
        right += names[int(np.argmax(likelihoods))] == truth
    return right / n


def _log_likelihood(facts: dict[str, str], disease: str) -> float:
    total = 0.0
    for name, value in facts.items():
        rule = synthetic.DISEASES[disease][name]
        ruled = (1 - synthetic.NOISE) * rule.get(value, 0.0) / sum(rule.values())
        total += np.log(synthetic.NOISE * (1 / len(synthetic.ATTRIBUTES[name])) + ruled)
    return total


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
    facts = [picture.facts for picture in drawn]
    held = len(facts) // 16  # to measure the tower on
    heads = train_tower(model, pixels[held:], facts[held:], steps=tower_steps, batch=64, seed=seed)
    with torch.no_grad():
        features = torch.cat([_seen(model, part) for part in pixels.split(256)])
    accuracy = tower_accuracy(heads, features[:held], facts[:held])
    train_decoder(
        model, prepare, features[held:], facts[held:], steps=decoder_steps, batch=24, seed=seed
    )
    model.half().save_pretrained(folder)
    prepare.save_pretrained(folder)
    told = {
        "command": "python tools/tiny_llava.py",
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "settings": {
            "pictures": pictures,
            "tower_steps": tower_steps,
            "decoder_steps": decoder_steps,
            "seed": seed,
        },
        "tower_accuracy": {name: round(share, 3) for name, share in accuracy.items()},
        "ceiling_of_diagnosis": round(bayes_accuracy(8000), 3),
    }
    (folder / "recipe.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(TINY, pictures=8000, tower_steps=900, decoder_steps=1200)
