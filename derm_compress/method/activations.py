"""What flows through the decoder: a tap on real tokens, and statistics of what it sees."""

from __future__ import annotations

import pandas as pd
import torch

from derm_compress.errors import DermError
from derm_compress.model import anatomy

STATISTICS = ["mean_abs", "p99", "max", "kurtosis", "outlier_channels"]
OUTLIER_FACTOR = 6.0  # an outlier channel's max |x| exceeds this many times the median channel's
DROPPED_BITS = 16  # of |x| as a float32: the others number the histogram's bins, 0.8 % wide at most


@torch.no_grad()
def tap(model, batches, modules, see, *, inputs=False):
    """Run a model over the batches; see(key, x) gets what each of {key: module} writes (or reads).

    x: [real tokens, channels], float32; tokens are real where the attention mask says so. Batches
    are the processor's output.
    """
    real, training = None, model.training

    def listen(key):
        def hook(_, args, output):
            x = args[0] if inputs else output
            x = x[0] if isinstance(x, tuple) else x
            see(key, x[real.to(x.device)].float())  # a spread model's blocks are on several

        return hook

    handles = [module.register_forward_hook(listen(key)) for key, module in modules.items()]
    try:
        model.eval()
        for batch in batches:
            ignored = ("labels", "token_weights")
            feed = {k: v.to(model.device) for k, v in batch.items() if k not in ignored}
            real = feed.get("attention_mask", torch.ones_like(feed["input_ids"])).bool()
            model(**feed, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if real is None:
        said = "no batch was given; pass at least one batch of the processor's output"
        raise DermError(f"activations: {said}")


class Summary:
    """Streaming summary of one projection's outputs; its size does not grow with the tokens."""

    def __init__(self):
        self.count = 0
        self.powers = 0.0  # sums of x, x^2, x^3, x^4 and |x|
        self.peak = None  # of each channel
        self.histogram = 0

    def add(self, x):
        """Take in x [tokens, channels]."""
        size, wide = x.abs().contiguous(), x.double().flatten()
        square = wide * wide
        moments = [wide.sum(), square.sum(), square @ wide, square @ square]
        self.count += x.numel()
        self.powers = self.powers + torch.stack([*moments, size.sum(dtype=torch.float64)])
        self.peak = size.amax(0) if self.peak is None else torch.maximum(self.peak, size.amax(0))
        bins = size.view(torch.int32).flatten() >> DROPPED_BITS
        self.histogram += torch.bincount(bins, minlength=1 << (31 - DROPPED_BITS))

    def quantile(self, share):
        """Quantile of |x| to within 0.4 %: the middle of its histogram bin (0 for the lowest)."""
        index = int((self.histogram.cumsum(0) < share * self.count).sum())
        middle = (index << DROPPED_BITS) + (1 << (DROPPED_BITS - 1))
        return torch.tensor(middle, dtype=torch.int32).view(torch.float32).item() if index else 0.0

    def row(self):
        """Statistics over all tokens and channels; kurtosis is Pearson's (3 for a normal one)."""
        m1, m2, m3, m4, mean_abs = (self.powers / self.count).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return {
            "mean_abs": mean_abs,
            "p99": self.quantile(0.99),
            "max": self.peak.max().item(),
            "kurtosis": fourth / variance**2 if variance > 1e-12 * m2 else float("nan"),
            "outlier_channels": int((self.peak > OUTLIER_FACTOR * self.peak.quantile(0.5)).sum()),
        }


def projections(model):
    """{(block, projection): linear} of the decoder, by short names such as q_proj."""
    return {
        (index, name.rpartition(".")[2]): linear
        for index, block in enumerate(anatomy.blocks(model))
        for name, linear in anatomy.linears(block).items()
    }


def projection_statistics(model, batches) -> pd.DataFrame:
    """Outputs of every projection: block (of the given model), projection, and STATISTICS."""
    watched = projections(model)
    summaries = {key: Summary() for key in watched}
    tap(model, batches, watched, lambda key, x: summaries[key].add(x))
    rows = []
    for (block, name), summary in summaries.items():
        if not torch.isfinite(summary.powers).all():
            where = f"NaN or infinite outputs of block {block} {name}"
            raise DermError(f"activations: {where}; check its dtype")
        rows.append({"block": block, "projection": name} | summary.row())
    return pd.DataFrame(rows)


def input_peaks(model, batches) -> pd.DataFrame:
    """What every projection reads: block, projection, channels, outlier_channels, and how many
    times the median channel's peak the loudest one's is.
    """
    watched, peaks = projections(model), {}

    def see(key, x):
        peak = x.abs().amax(0)
        peaks[key] = torch.maximum(peaks.get(key, peak), peak)

    tap(model, batches, watched, see, inputs=True)
    rows = []
    for (block, name), peak in peaks.items():
        median = peak.quantile(0.5)
        told = {"block": block, "projection": name, "channels": len(peak)}
        told["outlier_channels"] = int((peak > OUTLIER_FACTOR * median).sum())
        rows.append(told | {"loudest": (peak.max() / median).item()})
    return pd.DataFrame(rows)


def projection_output(model, batch, block, projection):
    """Outputs of one projection, float32 [real tokens, channels] (Figure 4: block 30, q_proj)."""
    watched, seen = projections(model), []
    key = block, projection.rpartition(".")[2]
    if key not in watched:
        last = len(anatomy.blocks(model)) - 1
        names = ", ".join(dict.fromkeys(name for _, name in watched))
        told = f"no {projection} in block {block}; blocks are 0 to {last}, names {names}"
        raise DermError(f"activations: {told}")
    tap(model, [batch], {key: watched[key]}, lambda _, x: seen.append(x.cpu()))
    return torch.cat(seen).numpy()
