"""Any file a camera or a data set leaves: upright RGB in bounded memory, or refused."""

import subprocess
import sys

import numpy as np
import pytest
from blotches import picture
from PIL import Image

from derm_compress.data import photographs


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source = picture(1, mode="L") if mode == "I;16" else picture(1)
    if mode == "I;16":
        Image.fromarray(np.asarray(source).astype(np.uint16) * 256 + 128).save(path)
    else:
        source.convert(mode).save(path)
    image = photographs.read_rgb(path, size=24)
    assert image.mode == "RGB" and image.size == source.size
    expected = source.convert("L" if mode in ("L", "LA", "I;16") else "RGB").convert("RGB")
    error = np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean()
    assert error < {"P": 20, "1": 130, "CMYK": 3}.get(mode, 0.01)


def test_transparency_is_white(tmp_path):
    clear = Image.new("RGBA", (40, 40), (10, 20, 30, 0))
    clear.paste((10, 20, 30, 255), (0, 0, 20, 40))
    clear.save(tmp_path / "a.png")
    palette = clear.convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((30, 30)))
    image = photographs.read_rgb(tmp_path / "a.png", size=24)
    assert image.getpixel((5, 5)) == (10, 20, 30) and image.getpixel((30, 30)) == (255, 255, 255)
    assert photographs.read_rgb(tmp_path / "p.png", size=24).getpixel((30, 30)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture(2).save(tmp_path / "a.png", exif=exif)
    image = photographs.read_rgb(tmp_path / "a.png", size=24)
    assert np.array_equal(np.asarray(image), np.asarray(picture(2).rotate(-90, expand=True)))


@pytest.mark.parametrize(("suffix", "mib"), [("jpg", 150), ("png", 300)])
def test_a_huge_picture_is_read_in_bounded_memory(tmp_path, suffix, mib):
    path = tmp_path / f"huge.{suffix}"
    small = picture(3, size=(120, 90), mode="L")
    options = {"compress_level": 1} if suffix == "png" else {}
    small.resize((12000, 9000), Image.Resampling.NEAREST).save(path, **options)
    code = (
        "import re, sys; from pathlib import Path; from derm_compress.data import photographs as p;"
        "image = p.read_rgb(Path(sys.argv[1]), size=24); p.fit(image, 24).tofile(sys.argv[2]);"
        "status = Path('/proc/self/status'); print(min(image.size));"
        "print(re.search(r'VmHWM:\\s*(\\d+)', status.read_text())[1] if status.exists() else 0)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "pixels")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shortest, peak = map(int, done.stdout.split())  # pixels, kB (0: not known on this system)
    assert shortest >= 96 and peak / 1024 < mib
    pixels = np.fromfile(tmp_path / "pixels", np.uint8).reshape(24, 24, 3).astype(float)
    assert np.abs(pixels - photographs.fit(small.convert("RGB"), 24)).mean() < 3


def test_damage_and_strips_are_refused(tmp_path):
    picture(1).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[-13] ^= 1  # in the checksum of the pixels
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(SyntaxError, match="broken PNG"):
        photographs.read_rgb(tmp_path / "a.png", size=24)
    picture(4, size=(33, 3000)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match="too long"):
        photographs.read_rgb(tmp_path / "strip.png", size=24)


@pytest.mark.parametrize("shape", [(400, 400), (486, 351), (97, 131), (50, 61)])
def test_fit_equals_clips_processor(shape):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    edges = {"size": {"shortest_edge": 72}, "crop_size": {"height": 72, "width": 72}}
    processor = clip.CLIPImageProcessorPil(**edges, do_rescale=False, do_normalize=False)
    values = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(photographs.fit(image, 72), values.transpose(1, 2, 0))


def test_perceptual_hash_knows_a_picture_again():
    bits = [photographs.perceptual_hash(picture(seed)) for seed in range(40)]
    again = photographs.perceptual_hash(picture(7).resize((200, 160)))
    assert (bits[7] ^ again).bit_count() <= 4
    assert min((bits[i] ^ bits[j]).bit_count() for i in range(40) for j in range(i)) > 8
    ramp = np.tile(np.arange(32, dtype=np.uint8), (32, 1))
    ramps = {photographs.perceptual_hash(Image.fromarray(ramp * k)) for k in range(1, 9)}
    assert len(ramps) == 1  # rounding noise has no bits
