"""Pipelines that are wrong in one way each, by the property that is there to see it."""

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import v2

from local_distill import CropGeometry, track

WRONG = {}


def caught_by(name):
    """Register a pipeline as the one that only this property sees."""

    def register(kind):
        assert name not in WRONG
        WRONG[name] = kind
        return kind

    return register


class Right:
    """A right pipeline with a place to spoil it."""

    def __init__(self):
        self.tracked = track(
            v2.Compose(
                [
                    v2.RandomResizedCrop((24, 32), scale=(0.3, 1.0)),
                    v2.RandomHorizontalFlip(),
                    v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True),
                ]
            )
        )

    def __call__(self, image):
        self.before(image)
        view, geometry = self.tracked(image)
        return self.after(view.as_subclass(Tensor), geometry, image)

    def before(self, image):
        pass

    def after(self, view, geometry, image):
        return view, geometry


@caught_by("pixels_follow_the_geometry")
class OffByFivePixels(Right):
    def after(self, view, geometry, image):
        matrix = geometry.matrix.clone()
        matrix[0, 2] += 5
        return view, geometry._replace(matrix=matrix)


@caught_by("geometry_has_its_shapes_and_dtypes")
class LongSizes(Right):
    def after(self, view, geometry, image):
        return view, geometry._replace(view_size=geometry.view_size.long())


@caught_by("the_same_seed_gives_the_same")
class FlipsEveryOtherImage(Right):
    calls = 0

    def after(self, view, geometry, image):
        self.calls += 1
        if self.calls % 2 == 0:
            return view, geometry
        width = view.shape[-1]
        mirror = torch.tensor([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
        return view.flip(-1), geometry._replace(matrix=geometry.matrix @ mirror)


@caught_by("later_calls_do_not_write_into_earlier_views")
class ReusesItsMemory(Right):
    def __init__(self):
        super().__init__()
        self.matrix = torch.zeros(3, 3)

    def after(self, view, geometry, image):
        return view, geometry._replace(matrix=self.matrix.copy_(geometry.matrix))


@caught_by("a_call_does_not_reseed")
class Reseeds(Right):
    def before(self, image):
        torch.manual_seed(3)


@caught_by("inputs_are_left_alone")
class ClearsTheImage(Right):
    def after(self, view, geometry, image):
        view = view.clone()
        if isinstance(image, Tensor):
            image.zero_()
        return view, geometry


@caught_by("pil_and_tensor_images_agree")
class DrawsOnceMoreForPil(Right):
    def before(self, image):
        if isinstance(image, PIL.Image.Image):
            torch.rand(1)


@caught_by("small_images_are_served_or_refused")
class CountsCornersAsPixels(Right):
    def after(self, view, geometry, image):
        height, width = geometry.source_size.tolist()
        scale = 1.0 if height > 1 < width else torch.nan
        return view, geometry._replace(matrix=geometry.matrix * scale)


@caught_by("other_modes_are_served_or_refused")
class SwapsTheSizeOfGreyImages(Right):
    def after(self, view, geometry, image):
        if isinstance(image, PIL.Image.Image) and image.mode == "L":
            geometry = geometry._replace(source_size=geometry.source_size.flip(0))
        return view, geometry


@caught_by("flat_images_stay_finite")
class DividesByTheBrightest(Right):
    def after(self, view, geometry, image):
        return view / view.amax(), geometry


@caught_by("a_pickled_copy_works_alike")
class HoldsALambda(Right):
    def __init__(self):
        super().__init__()
        self.change = lambda view: view


@caught_by("a_loader_collates_the_views")
class ViewsOfManySizes(Right):
    def after(self, view, geometry, image):
        height = int(torch.randint(12, 24, ()))
        size = torch.tensor([height, view.shape[-1]], dtype=torch.int32)
        return view[..., :height, :], geometry._replace(view_size=size)


def without_geometry(image):
    return image


def one_geometry_too_few(image):
    geometry = Right()(image)[1]
    return [image, image], [geometry]


def no_crop_geometry(image):
    return image, tuple(CropGeometry._fields)
