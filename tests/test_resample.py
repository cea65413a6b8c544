"""The CPU kernel gives torch's bytes: every size, scale, crop, mirror, and both codes, vector and scalar."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, read_image

from geoaug.pixels.resample import VECTOR, resample, scratch_bytes

Bytes = npt.NDArray[np.uint8]
GUARD = 64


def ours(image: Bytes, crop: tuple[int, int, int, int], size: tuple[int, int], flip: bool, vector: bool) -> Bytes:
    """Renders between guards: of the scratch and of the output, so that a write outside is seen."""
    (height, width), (h, w) = image.shape[:2], size
    scratch, out = (np.full(n + 2 * GUARD, 165, np.uint8) for n in (scratch_bytes(height, width, h, w), 3 * h * w))
    memory, target = (x.ctypes.data + GUARD for x in (scratch, out))
    resample(image.ctypes.data, height, width, *crop, int(flip), memory, target, h, w, int(vector))
    for x in (scratch, out):
        assert (x[:GUARD] == 165).all()
        assert (x[-GUARD:] == 165).all()
    return out[GUARD:-GUARD].reshape(3, h, w)


def torchs(image: Bytes, crop: tuple[int, int, int, int], size: tuple[int, int], flip: bool) -> Bytes:
    x0, y0, x1, y1 = crop
    source = torch.from_numpy(image).permute(2, 0, 1)[None, :, y0:y1, x0:x1]
    out = interpolate(source, size, mode="bilinear", antialias=True, align_corners=False)[0].numpy()
    return out[:, :, ::-1] if flip else out


def noise(rng: np.random.Generator, height: int, width: int, hard: bool) -> Bytes:
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if hard else image


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("largest", [6, 40, 300])
@pytest.mark.parametrize("view", [6, 40, 130])
def test_equals_torch_on_random_crops(vector: bool, largest: int, view: int) -> None:
    rng = np.random.default_rng([largest, view])
    for n in range(60 if vector or largest * view < 2000 else 12):
        height, width, h, w = (int(rng.integers(1, most + 1)) for most in (largest, largest, view, view))
        x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
        crop = (x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1)))
        image = noise(rng, height, width, n % 3 == 0)
        before = image.copy()
        result = ours(image, crop, (h, w), n % 2 == 1, vector)
        assert np.array_equal(result, torchs(image, crop, (h, w), n % 2 == 1)), (height, width, crop, h, w)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("scale", [1 / 8, 1 / 3, 0.9, 1.0, 1.01, 1.5, 2.0, 2.5, 3.7, 4.0, 5.0, 6.3, 8.0, 11.0, 40.0])
@pytest.mark.parametrize("vector", [True, False])
def test_equals_torch_at_every_number_of_taps(scale: float, vector: bool) -> None:
    rng = np.random.default_rng(7)
    for h, w in ((5, 7), (17, 16), (16, 33)):
        height, width = (max(1, round(side * scale)) for side in (h, w))
        for odd in (0, 1):
            image = noise(rng, height, width + odd, bool(odd))
            crop = (0, 0, width + odd, height)
            result = ours(image, crop, (h, w), bool(odd), vector)
            assert np.array_equal(result, torchs(image, crop, (h, w), bool(odd)))


@pytest.mark.parametrize("vector", [True, False])
def test_extreme_shapes(vector: bool) -> None:
    rng = np.random.default_rng(3)
    for height, width, h, w in ((1, 1, 1, 1), (1, 1, 33, 17), (1, 4000, 3, 2), (3000, 1, 2, 40), (2, 3, 1, 1)):
        image = noise(rng, height, width, True)
        crop = (0, 0, width, height)
        assert np.array_equal(ours(image, crop, (h, w), True, vector), torchs(image, crop, (h, w), True))
        last = (width - 1, height - 1, width, height)  # one pixel, at the very end of the memory
        assert np.array_equal(ours(image, last, (h, w), False, vector), torchs(image, last, (h, w), False))


def test_a_flat_image_stays_flat() -> None:
    for level in (0, 1, 128, 255):
        image = np.full((61, 83, 3), level, np.uint8)
        assert (ours(image, (3, 2, 80, 60), (37, 19), False, VECTOR) == level).all()


def photographs(data: Path, count: int) -> list[Bytes]:
    files = sorted((data / "coco_mini" / "images").rglob("*.jpg"))
    if not files:
        pytest.skip("no photographs in coco_mini")
    chosen = files[:: max(1, len(files) // count)][:count]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's decoders are on their way out
        images = [read_image(str(file), ImageReadMode.RGB).permute(1, 2, 0) for file in chosen]
    return [np.ascontiguousarray(image.numpy()) for image in images]


def test_equals_torch_on_photographs(data: Path) -> None:
    rng = np.random.default_rng(11)
    for n, image in enumerate(photographs(data, 24)):
        height, width = image.shape[:2]
        for h, w in ((224, 224), (96, 96), (5, 7), (height // 8, width // 8), (161, 227)):
            x0, y0 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
            crop = (x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1)))
            crop = (0, 0, width, height) if h == height // 8 else crop
            flip = n % 2 == 0
            assert np.array_equal(ours(image, crop, (h, w), flip, VECTOR), torchs(image, crop, (h, w), flip))


# The image ends where readable memory ends, so that a load beyond it would end the process.
_IN_A_PROCESS = """
import ctypes, mmap, sys
import numpy as np
from geoaug.pixels.resample import resample, scratch_bytes
bytes_ = (np.arange(90 * 70 * 3) % 251).astype(np.uint8)
room = -(-bytes_.size // mmap.PAGESIZE) * mmap.PAGESIZE
memory = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
if sys.platform == "linux":
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data + room), mmap.PAGESIZE, 0) == 0
memory[room - bytes_.size : room] = bytes_
address, size = memory.ctypes.data + room - bytes_.size, (33, 47)
scratch, out = np.empty(scratch_bytes(90, 70, *size), np.uint8), np.empty((3, *size), np.uint8)
resample(address, 90, 70, 3, 2, 70, 90, 1, scratch.ctypes.data, out.ctypes.data, *size, 1)
print(out.tobytes().hex())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
@pytest.mark.parametrize("features", ["", "+sse2,+ssse3,+avx,+avx2"])
def test_code_for_lesser_processors(features: str, tmp_path: Path) -> None:
    """Without named features the code is what other processors get, LLVM's portable language alone."""
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    env["NUMBA_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", _IN_A_PROCESS], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    image = (np.arange(90 * 70 * 3) % 251).astype(np.uint8).reshape(90, 70, 3)
    expected = torchs(image, (3, 2, 70, 90), (33, 47), True)
    assert bytes.fromhex(run.stdout.strip()) == np.ascontiguousarray(expected).tobytes()
