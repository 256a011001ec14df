"""Images, and loaders of their views, for what makes several views of an image."""

import itertools

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from local_distill.training.loading import view_loader

# MultiCrop without its colours: views are crops of the image and nothing else.
PLAIN = {
    "color_jitter": None,
    "grayscale_p": 0.0,
    "blur_p": (0.0, 0.0, 0.0),
    "solarize_p": 0.0,
    "normalize": None,
}


def photograph(height=40, width=50, seed=1):
    """(3, height, width) uint8 of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def same(a, b):
    """Whether two nests of tensors are equal to the bit."""
    a, b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Photographs(Dataset):
    """Six PIL images: what a transform makes of them, or each with its index."""

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = F.to_pil_image(photograph(30 + index, 41))
        return (image, index) if self.transform is None else self.transform(image)


def assert_a_seeded_loader_repeats(transform, workers):
    """The same views from the same seed, others from another, and no two images alike."""

    def batches(seed):
        torch.manual_seed(seed)  # without workers the views draw from here
        loader = DataLoader(
            Photographs(transform),
            batch_size=1,
            num_workers=workers,
            generator=torch.Generator().manual_seed(seed),  # and workers are seeded from this
        )
        return list(loader)

    first = batches(0)
    assert same(first, batches(0))
    assert not same(first, batches(1))
    # the odd batches come from another worker
    matrices = [geometries[0].matrix for _, geometries in first]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(matrices, 2))


def assert_views_do_not_depend_on_the_workers(transform):
    """The trainer's loader seeds by index: two batches of views, with 0 and with 2 workers."""
    found = [
        list(
            itertools.islice(
                view_loader(Photographs(), transform, batch_size=2, seed=3, workers=workers), 4
            )
        )
        for workers in (0, 2)
    ]
    assert same(*found)
    assert not same(found[0][0], found[0][1])
