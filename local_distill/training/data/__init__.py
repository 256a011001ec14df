"""Where images come from, and what happens to the bad ones among them."""

from local_distill.training.data.bad_images import BadImages
from local_distill.training.data.decoding import BadImageError, ImageLimits, decode_image
from local_distill.training.data.hugging_face import HuggingFaceImages
from local_distill.training.data.image_files import ImageFiles
from local_distill.training.data.image_lists import ImageList
from local_distill.training.data.image_source import ImageSource
from local_distill.training.data.open_images import open_images
from local_distill.training.data.shards import ShardImages
from local_distill.training.data.worker_failures import named_worker_failures

__all__ = [
    "BadImageError",
    "BadImages",
    "HuggingFaceImages",
    "ImageFiles",
    "ImageLimits",
    "ImageList",
    "ImageSource",
    "ShardImages",
    "decode_image",
    "named_worker_failures",
    "open_images",
]
