"""Questions about pictures of the test split, as model inputs, and what a model says to them."""

import torch

from derm_compress.model import prompts


def inputs_of(processor, dataset, n=2):
    items = dataset.of("test")[:n]
    texts = [prompts.prompt(processor, kind) for kind in ("name", "features")][:n]
    return prompts.prepare(processor, texts, dataset.images[[i.row for i in items]], "cpu")


def about(processor, images, *kinds):
    """These of the study's questions, each about the picture of its place."""
    texts = [prompts.prompt(processor, kind) for kind in kinds]
    return prompts.prepare(processor, texts, images[: len(kinds)], "cpu")


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits
