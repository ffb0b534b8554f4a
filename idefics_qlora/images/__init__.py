"""From a path, URL or bytes to the RGB pixels of a picture.

Knows nothing of models or rows.
"""

from idefics_qlora.images.access import BadImage, ImageAccess
from idefics_qlora.images.cropping import full_image, random_crop
from idefics_qlora.images.opening import open_image
from idefics_qlora.images.prefetch import FailedImage, PrefetchResult, prefetch_images

__all__ = [
    "BadImage",
    "FailedImage",
    "ImageAccess",
    "PrefetchResult",
    "full_image",
    "open_image",
    "prefetch_images",
    "random_crop",
]
