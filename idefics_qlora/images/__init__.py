"""Pictures: from a path, URL or bytes to RGB pixels; knows nothing of models or rows."""

from idefics_qlora.images.access import BadImage, ImageAccess
from idefics_qlora.images.opening import (
    FailedImage,
    PrefetchResult,
    full_image,
    open_image,
    prefetch_images,
    random_crop,
)

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
