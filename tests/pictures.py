"""Drawn pictures of any shape."""

import numpy as np
from PIL import Image


def painted(width, height, seed=0):
    """A picture of soft colours: noise, enlarged."""
    noise = np.random.default_rng(seed + 1000 * width + height).integers(
        0, 256, (4, 4, 3), np.uint8
    )
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
