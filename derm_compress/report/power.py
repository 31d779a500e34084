"""What differences a set of pictures can tell: the normal approximation for a paired mean over images. No torch.

With d the mean difference of an image's answers and s its standard deviation over m images, a two-sided test at alpha
finds a true difference D with the chance `power` where D = (z(1 - alpha/2) + z(power)) s / sqrt(m).
"""

from statistics import NormalDist

import numpy as np

ALPHA, POWER = 0.05, 0.80
PAPER_IMAGES = 39  # with three questions each


def quantiles(alpha: float = ALPHA, power: float = POWER) -> float:
    """z(1 - alpha/2) + z(power): 2.802 at the usual two."""
    return NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)


def detectable(sd: float, images: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true difference found with that power, in sd's unit; nan without images or spread."""
    return quantiles(alpha, power) * sd / np.sqrt(images) if images and sd else np.nan


def images_needed(
    sd: float, difference: float, *, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Images from which on such a true difference is found with that power; nan for none."""
    return np.ceil((quantiles(alpha, power) * sd / difference) ** 2) if difference else np.nan


def chance(sd: float, images: int, difference: float, *, alpha: float = ALPHA) -> float:
    """The power itself: how often a true difference is found; nan without spread."""
    if not sd:
        return np.nan
    line = NormalDist().inv_cdf(1 - alpha / 2)
    shift = abs(difference) * np.sqrt(images) / sd
    return NormalDist().cdf(shift - line) + NormalDist().cdf(-shift - line)
