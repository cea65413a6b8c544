"""Colour spaces of selective search (Uijlings et al. 2013, section 3.2), as bytes: the same on every machine.

No annotations on the kernels: numba reads the types, and a checker between `njit` and the function would stop it.
"""

import numpy as np
from numba import njit

HSV, LAB, RG_I, HUE, GRAY = range(5)
_STEPS = 4096

_levels = np.arange(256) / 255.0
_LINEAR = np.where(_levels > 0.04045, ((_levels + 0.055) / 1.055) ** 2.4, _levels / 12.92)
_shares = np.arange(_STEPS + 1) / _STEPS
_ROOT = np.where(_shares > 0.008856, np.cbrt(_shares), 7.787 * _shares + 16.0 / 116.0)


@njit(cache=True, nogil=True)
def channels(space):
    """The number of channels of a space."""
    return 3 if space <= RG_I else 1


@njit(cache=True, nogil=True, inline="always")
def _hue(red, green, blue, value, spread):
    """Hue in steps of 2 degrees, 0 to 179; 0 for gray."""
    if spread == 0:
        return np.int64(0)
    if value == red:
        turn = (green - blue) / spread
    elif value == green:
        turn = 2.0 + (blue - red) / spread
    else:
        turn = 4.0 + (red - green) / spread
    return np.int64(30.0 * turn + 180.5) % 180


@njit(cache=True, nogil=True)
def _to_lab(red, green, blue):
    """CIE L*a*b* (D65) in bytes: L by 2.55, a and b from -128."""
    r, g, b = _LINEAR[red], _LINEAR[green], _LINEAR[blue]
    x = _ROOT[int((0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.950456 * _STEPS + 0.5)]
    y = _ROOT[int((0.212671 * r + 0.715160 * g + 0.072169 * b) * _STEPS + 0.5)]
    z = _ROOT[int((0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.088754 * _STEPS + 0.5)]
    light, a, b = (116.0 * y - 16.0) * 2.55, 500.0 * (x - y) + 128.0, 200.0 * (y - z) + 128.0
    return min(max(int(light + 0.5), 0), 255), min(max(int(a + 0.5), 0), 255), min(max(int(b + 0.5), 0), 255)


@njit(cache=True, nogil=True)
def convert(image, space, out):
    """out uint8 [C, H, W] <- image uint8 [H, W, 3] in a colour space."""
    height, width, _ = image.shape
    for y in range(height):
        for x in range(width):
            red, green, blue = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
            if space in (HSV, HUE):
                value = max(red, green, blue)
                spread = value - min(red, green, blue)
                out[0, y, x] = _hue(red, green, blue, value, spread)
                if space == HSV:
                    out[1, y, x] = (510 * spread + value) // (2 * value) if value > 0 else 0
                    out[2, y, x] = value
            elif space == LAB:
                out[0, y, x], out[1, y, x], out[2, y, x] = _to_lab(red, green, blue)
            elif space == RG_I:
                total = red + green + blue
                out[0, y, x] = (510 * red + total) // (2 * total) if total > 0 else 0
                out[1, y, x] = (510 * green + total) // (2 * total) if total > 0 else 0
                out[2, y, x] = (2 * total + 3) // 6
            else:
                out[0, y, x] = (299 * red + 587 * green + 114 * blue + 500) // 1000
