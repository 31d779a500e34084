"""What a width costs a linear: the sum of |gradient x change| over its weights, to first order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from derm_compress.data.items import Item
from derm_compress.files import Journal
from derm_compress.method.allocation.allocation import WIDTHS
from derm_compress.method.assemble import materialize
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.scoring import answer_loss, gradients
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization.grids import grid_of
from derm_compress.method.quantization.methods import WHOLE, Form
from derm_compress.model import anatomy, devices, removal
from derm_compress.model.recipe import Recipe
from derm_compress.progress import track

COLUMNS = ["units_removed", "block", "linear", "bits", "cost"]


def bit_costs(
    recipe: Recipe,
    plan: Plan,
    depths: Iterable[int],
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    method: str,
    group_size: int,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """Costs of every kept linear at every width (COLUMNS), anew without the plan's first units.

    The loss is that of the reference answers about pictures, so that what is read beside them
    counts as far as answers depend on it. `block` is the original index.
    """
    model, processor = materialize(recipe, store, device)
    c, journal = Calibration(model, processor, items, images), journal or Journal()
    for n in track([n for n in depths if str(n) not in journal.done], "costs by depth"):
        with removal.without(model, plan.removed(n)):
            kept = plan.kept(n)
            rows = list(linear_costs(c, method, group_size))
        journal.add(str(n), [row | {"block": kept[row["block"]]} for row in rows])
    devices.let_go(model)
    frames = [pd.DataFrame(journal.done[str(n)]).assign(units_removed=n) for n in depths]
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def linear_costs(c: Calibration, method: str, group_size: int) -> Iterator[dict]:
    """A row a linear and width: the mean over pictures of sum |g (w - Q(w))|.

    Gradients are used and dropped as they come, as taylor's are.
    """
    places = {
        linear.weight: (index, name)
        for index, block in enumerate(anatomy.blocks(c.model))
        for name, linear in anatomy.linears(block).items()
    }
    narrow = [bits for bits in WIDTHS if bits != WHOLE]
    grids = {bits: grid_of(Form(method, bits, group_size)) for bits in narrow}
    scale = devices.loss_scale(c.model.dtype)
    total = defaultdict(float)

    @torch.no_grad()
    def use(weight):
        gradient = weight.grad.float().div_(scale)
        for bits, grid in grids.items():
            change = grid.rounded(weight.detach()).sub_(weight).mul_(gradient)
            total[places[weight], bits] += change.abs_().sum().item() / len(c.items)
        weight.grad = None

    with gradients(c.model, list(places), use):
        for item in c.items:
            with devices.attention_with_gradients():
                (scale * answer_loss(c, item)).backward()
    for block, name in places.values():
        for bits in WIDTHS:
            cost = total.get(((block, name), bits), 0.0)
            yield {"block": block, "linear": name, "bits": bits, "cost": cost}
