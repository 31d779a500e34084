"""Distillation: a pruned model also learns how sure the unpruned one is of every word (Hinton et
al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from derm_compress.model.prompts import IGNORED


@dataclass(frozen=True)
class Teacher:
    """A model that is listened to, and how much: the right words keep 1 - weight of the loss."""

    model: object
    weight: float

    def corrected(self, told, read: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of what a model has told of what it read: (1 - weight) CE + weight KL."""
        with torch.no_grad(), torch.autocast(told.logits.device.type, enabled=False):
            x = read["inputs_embeds"].to(self.model.dtype)
            mask = read["attention_mask"]
            theirs = self.model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
        apart = divergence(theirs, told.logits, read["labels"])
        return (1 - self.weight) * told.loss + self.weight * apart


def divergence(theirs: torch.Tensor, ours: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) in nats, mean over the answers' tokens; logits [rows, tokens, words]."""
    asked = labels[:, 1:] != IGNORED  # a token's logits tell the next one
    p, q = (each[:, :-1][asked].float().log_softmax(-1) for each in (theirs, ours))
    return kl_div(q, p, log_target=True, reduction="batchmean")
