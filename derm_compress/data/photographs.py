"""A photograph's file -> upright RGB pixels, and hashes by which duplicates are found. No torch."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.fft import dctn

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MIN_SIDE = 32
LARGE = 2**24  # pixels above which a picture shrinks while it is decoded, to bound memory
STRIP = 16  # longest edge over shortest; a longer strip would be resized to a huge picture


def read_rgb(path: Path, *, size: int) -> Image.Image:
    """Decode a file fully and upright, on white; large ones shrink, but not below 4 x size.

    path: a file, or one in a zip archive. Raises whatever the decoder raises on damage, ValueError
    for a picture too small or too long.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            image.verify()
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            shape = "{} x {}".format(*image.size)
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"too small: {shape}, the shorter edge needs {MIN_SIDE}")
            if max(image.size) > STRIP * min(image.size):
                raise ValueError(f"too long: {shape}")
            large = image.width * image.height > LARGE
            if large:
                image.draft(None, (4 * size, 4 * size))
            image.load()
            image = _eight_bit(image)
            factor = min(image.size) // (4 * size)
            if large and factor > 1:
                image = _reduce(image, factor)
            return _on_white(ImageOps.exif_transpose(image))


def _reduce(image: Image.Image, factor: int) -> Image.Image:
    """Average blocks of factor x factor; what does not fill a block is cut off on both sides."""
    width, height = (edge // factor * factor for edge in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.reduce(factor, (left, top, left + width, top + height))


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip, not scale
        return image.point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of type {image.mode} have no known range")
    return image.convert("RGBA") if image.mode in ("1", "P", "PA") else image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, in one line and without the path."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image ({', '.join(FORMATS)})"
    return " ".join(str(error).replace(str(path), path.name).split())[:150] or type(error).__name__


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Shorter edge to `size` (bicubic), centre crop: uint8 [size, size, 3], as CLIP's processor."""
    short = min(image.size)
    width, height = (int(size * edge / short) for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def pixel_hash(pixels: np.ndarray) -> str:
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of a grey thumbnail's 8 x 8 lowest cosine coefficients exceed their median."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = dctn(grey, norm="ortho")[:8, :8].ravel().round(6)  # a flat picture must not hash noise
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def thumbnails(images: np.ndarray, side: int = 16) -> np.ndarray:
    """uint8 [N, S, S, 3] -> unit vectors [N, 3 x side x side]: coarse colours less their mean.

    No studied model has a part in it. It finds recoloured and recompressed copies, not rotated or
    differently cropped ones.
    """
    small = [Image.fromarray(image).resize((side, side), Image.Resampling.BOX) for image in images]
    flat = np.stack([np.asarray(image, np.float32).ravel() for image in small])
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
