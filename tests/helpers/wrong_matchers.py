"""Matchers with one fault each, and the property of the test kit that has to catch it, alone.

Each is a right matcher in which one thing is spoilt: what goes in, what comes out, or a step in
between. Where it could be, the fault is one that people make.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers.plain_matchers import PlainNearest
from local_distill import Matches, SimilarityMatcher, Tokens, source_valid
from local_distill.geometry import wide_centers, wide_diagonals

WRONG: list[tuple[str, type[nn.Module]]] = []


def caught_by(name):
    """Register a wrong matcher under the one property that it breaks."""

    def register(matcher):
        WRONG.append((name, matcher))
        return matcher

    return register


class Similar(nn.Module):
    """A right similarity matcher, with two places to spoil it at."""

    def __init__(self):
        super().__init__()
        self.right = SimilarityMatcher()

    def before(self, student, teacher):
        return student, teacher

    def after(self, found, student, teacher):
        return found

    def forward(self, student, teacher):
        return self.after(self.right(*self.before(student, teacher)), student, teacher)


class Near(Similar):
    """A right geometric matcher, likewise."""

    def __init__(self):
        super().__init__()
        self.right = PlainNearest()


def features_mapped(tokens: Tokens, function) -> Tokens:
    return (
        tokens if tokens.features is None else tokens._replace(features=function(tokens.features))
    )


def matrix_mapped(tokens: Tokens, function) -> Tokens:
    if tokens.geometry is None:
        return tokens
    matrix = function(tokens.geometry.matrix)
    return tokens._replace(geometry=tokens.geometry._replace(matrix=matrix))


def cost_changed(found: Matches, cost: Tensor) -> Matches:
    """Another cost where there is a match, so that no NaN is made up elsewhere; no gradient."""
    cost = cost.detach().to(found.cost.dtype)
    return found._replace(cost=torch.where(found.matched, cost, found.cost))


# What comes back, and what is left alone


class LookAlike(NamedTuple):
    teacher_index: Tensor
    weight: Tensor
    cost: Tensor


@caught_by("returns_matches_of_fitting_shapes")
class ReturnsAStructureOfItsOwn(Similar):
    def after(self, found, student, teacher):
        return LookAlike(*found)


@caught_by("returns_matches_of_fitting_shapes")
class WeighsACandidateWithoutIndex(Similar):
    def after(self, found, student, teacher):
        more = torch.zeros_like(found.weight)
        return found._replace(weight=torch.cat((found.weight, more), -1))


@caught_by("indices_are_in_range")
class WritesMinusOneWhereNothingMatched(Near):
    def after(self, found, student, teacher):
        index = torch.where(found.weight > 0, found.teacher_index, -1)
        return found._replace(teacher_index=index)


@caught_by("weights_are_shares")
class WeighsTwice(Similar):
    def after(self, found, student, teacher):
        return found._replace(weight=found.weight * 2)


@caught_by("weights_are_shares")
class WeighsAgainst(Near):
    def after(self, found, student, teacher):
        weight = torch.cat((found.weight, -0.5 * found.weight), -1)
        index = torch.cat((found.teacher_index, found.teacher_index), -1)
        return Matches(index, weight, found.cost)


@caught_by("cost_is_infinite_where_nothing_matched")
class CostsAThousandWhereNothingMatched(Near):
    def after(self, found, student, teacher):
        if found.weight.shape[2] == 0:
            return found
        return found._replace(cost=torch.where(found.matched, found.cost, 1000.0))


@caught_by("weights_and_costs_are_at_least_float32")
class WeighsInTheFeaturesDtype(Similar):
    def after(self, found, student, teacher):
        return found._replace(weight=found.weight.to(student.features.dtype))


@caught_by("new_tensors_follow_the_inputs_device")
class ForgetsTheDevice(Similar):
    def after(self, found, student, teacher):
        return found._replace(weight=found.weight * torch.ones(1, dtype=found.weight.dtype))


@caught_by("the_same_call_gives_the_same")
class DithersEveryOtherCall(Similar):
    calls = 0

    def after(self, found, student, teacher):
        self.calls += 1
        return found._replace(cost=found.cost + 1e-6 * (self.calls % 2))


@caught_by("calls_do_not_remember")
class CountsHowOftenTheViewChanges(Similar):
    changes, last = 0, 0

    def after(self, found, student, teacher):
        self.changes += self.last != teacher.num_tokens
        self.last = teacher.num_tokens
        return found._replace(cost=found.cost + 1e-6 * self.changes)


@caught_by("no_gradient_flows")
class LetsAGradientThrough(Similar):
    def after(self, found, student, teacher):
        length = student.features.norm(dim=-1)
        cost = found.cost + (length - length.detach())
        return found._replace(cost=torch.where(found.matched, cost, found.cost))


@caught_by("inputs_are_left_alone")
class ScalesItsInputInPlace(Similar):
    def before(self, student, teacher):
        # a copy only of what is not contiguous; the cosine is the same to the bit
        features = student.features
        if not (features is None or torch.compiler.is_compiling() or features.is_inference()):
            features.detach().contiguous().mul_(2.0)
        return student, teacher


@caught_by("layout_does_not_matter")
class ViewsFeaturesAsRows(Similar):
    def before(self, student, teacher):
        return features_mapped(student, lambda f: f.view(-1, f.shape[-1]).view(f.shape)), teacher


@caught_by("inference_mode_works")
class HasALearntScale(Similar):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def before(self, student, teacher):
        return features_mapped(student, lambda f: self.scale * f), teacher


@caught_by("match_views_agrees_with_single_calls")
class SwapsThePairs(Similar):
    def match_views(self, student, teacher, pairs):
        return {(v, q): self(teacher[q], student[v]) for v, q in pairs}


@caught_by("copies_work_alike")
class HoldsALambda(Similar):
    def __init__(self):
        super().__init__()
        self.scale = lambda cost: cost


# Images of a batch


@caught_by("images_added_change_nothing")
class AveragesCostsOverTheBatch(Similar):
    def after(self, found, student, teacher):
        return found._replace(cost=found.cost / max(1, found.cost.shape[0]))


@caught_by("order_of_images_does_not_matter")
class CostsMoreInLaterImages(Similar):
    def after(self, found, student, teacher):
        place = torch.arange(found.cost.shape[0], device=found.cost.device)
        return found._replace(cost=found.cost + 0.1 * place[:, None])


@caught_by("a_bad_image_stays_alone")
class GivesUpOnTheBatch(Similar):
    def after(self, found, student, teacher):
        good = ~student.features.isnan().all((1, 2)).any()
        return Matches(
            found.teacher_index,
            torch.where(good, found.weight, 0.0),
            torch.where(good, found.cost, torch.inf),
        )


@caught_by("an_empty_batch_is_served")
class LooksForTheLargestImage(Similar):
    def after(self, found, student, teacher):
        student.features.sum((1, 2)).argmax(0)
        return found


@caught_by("a_teacher_without_tokens_is_served")
class AlwaysGivesACandidate(Similar):
    def after(self, found, student, teacher):
        if found.weight.shape[2]:
            return found
        none = found.cost[..., None]
        return Matches(
            torch.zeros_like(none, dtype=torch.int64), torch.zeros_like(none), found.cost
        )


@caught_by("a_student_without_tokens_is_served")
class LooksForTheLargestStudentToken(Similar):
    def after(self, found, student, teacher):
        student.features.sum(2).argmax(1)
        return found


@caught_by("grids_of_one_token_are_served")
class DividesByTheGridsExtent(Near):
    def after(self, found, student, teacher):
        extent = teacher.grid.rows + teacher.grid.cols - 2
        return found if extent else Matches(found[0], found[1] * 0, found[2] + torch.inf)


# Precision, and the ways in which torch runs the same code


@caught_by("half_precision_features_match_as_float32")
class NormalisesInHalfPrecision(Similar):
    def before(self, student, teacher):
        return tuple(features_mapped(view, self.unit) for view in (student, teacher))

    def unit(self, features):
        if features.dtype not in (torch.float16, torch.bfloat16):
            return features
        return features / features.norm(dim=-1, keepdim=True)


@caught_by("autocast_changes_nothing")
class MultipliesUnderAutocast(Similar):
    def before(self, student, teacher):
        return features_mapped(student, self.projected), teacher

    def projected(self, features):
        return features @ torch.eye(
            features.shape[-1], dtype=features.dtype, device=features.device
        )


@caught_by("float64_stays_float64")
class ReturnsFloat32(Similar):
    def after(self, found, student, teacher):
        return found._replace(weight=found.weight.float(), cost=found.cost.float())


@caught_by("float64_agrees_with_float32")
class RoundsFloat64(Similar):
    def before(self, student, teacher):
        return features_mapped(student, self.rounded), teacher

    def rounded(self, features):
        return features.round() if features.dtype == torch.float64 else features


@caught_by("extreme_features_stay_finite")
class CubesTheNorm(Similar):
    def after(self, found, student, teacher):
        cube = student.features.float().norm(dim=-1) ** 3
        return cost_changed(found, found.cost * (cube / cube))


@torch.compiler.disable
def _outside_of_graphs(cost):
    return cost + 0.0


@caught_by("compiles_without_graph_breaks")
class BreaksTheGraph(Similar):
    def after(self, found, student, teacher):
        return found._replace(cost=_outside_of_graphs(found.cost))


@caught_by("vmap_works")
class WritesIntoABuffer(Similar):
    def after(self, found, student, teacher):
        shape, dtype, device = found.cost.shape, found.cost.dtype, found.cost.device
        cost = torch.zeros(shape, dtype=dtype, device=device)
        cost.copy_(found.cost)
        return found._replace(cost=cost)


# Bad tokens and bad inputs


def without_nan(features):
    return torch.where(features.isnan(), 0.0, features)


def without_infinity(features):
    return torch.where(features.isinf(), 0.0, features)


def without_zeros(features):
    """Rows of zeros get a direction, as they do from an epsilon in the norm's denominator."""
    return torch.where((features == 0).all(-1, keepdim=True), 1.0, features)


@caught_by("nan_student_tokens_are_unmatched")
class TakesNanForZeroInTheStudent(Similar):
    def before(self, student, teacher):
        return features_mapped(student, without_nan), teacher


@caught_by("nan_teacher_tokens_capture_nothing")
class TakesNanForZeroInTheTeacher(Similar):
    def before(self, student, teacher):
        return student, features_mapped(teacher, without_nan)


@caught_by("infinite_student_tokens_are_unmatched")
class TakesInfinityForZeroInTheStudent(Similar):
    def before(self, student, teacher):
        return features_mapped(student, without_infinity), teacher


@caught_by("infinite_teacher_tokens_capture_nothing")
class TakesInfinityForZeroInTheTeacher(Similar):
    def before(self, student, teacher):
        return student, features_mapped(teacher, without_infinity)


@caught_by("zero_student_tokens_are_unmatched")
class GivesZeroStudentTokensADirection(Similar):
    def before(self, student, teacher):
        return features_mapped(student, without_zeros), teacher


@caught_by("zero_teacher_tokens_capture_nothing")
class GivesZeroTeacherTokensADirection(Similar):
    def before(self, student, teacher):
        return student, features_mapped(teacher, without_zeros)


@caught_by("bad_student_tokens_leave_others_alone")
class DropsImagesWithABadStudentToken(Similar):
    def after(self, found, student, teacher):
        good = ~student.features.isnan().any((1, 2))
        return Matches(
            found.teacher_index,
            torch.where(good[:, None, None], found.weight, 0.0),
            torch.where(good[:, None], found.cost, torch.inf),
        )


@caught_by("bad_teacher_tokens_leave_others_alone")
class DropsImagesWithABadTeacherToken(Similar):
    def after(self, found, student, teacher):
        good = ~teacher.features.isnan().any((1, 2))
        return Matches(
            found.teacher_index,
            torch.where(good[:, None, None], found.weight, 0.0),
            torch.where(good[:, None], found.cost, torch.inf),
        )


@caught_by("student_tokens_outside_the_source_are_unmatched")
class ForgetsTheStudentsPadding(Similar):
    def before(self, student, teacher):
        return student._replace(geometry=None), teacher


@caught_by("teacher_tokens_outside_the_source_capture_nothing")
class ForgetsTheTeachersPadding(Similar):
    def before(self, student, teacher):
        return student, teacher._replace(geometry=None)


@caught_by("a_nan_geometry_is_refused_or_unmatched")
class TakesNanForZeroInTheMatrix(Near):
    def before(self, student, teacher):
        return tuple(matrix_mapped(view, without_nan) for view in (student, teacher))


@caught_by("batches_that_differ_are_refused")
class BroadcastsOneImage(Similar):
    def before(self, student, teacher):
        if student.features is None or teacher.features is None:
            return student, teacher
        if student.features.shape[0] == 1:
            student = self.repeated(student, teacher.features.shape[0])
        return student, teacher

    def repeated(self, view, count):
        features = view.features.expand(count, -1, -1)
        return Tokens(features, None, None)


@caught_by("missing_inputs_are_refused")
class ReadsTheShapeFirst(Similar):
    def before(self, student, teacher):
        assert student.features.dim() == 3  # an AttributeError where there are none
        return student, teacher


@caught_by("features_of_other_widths_are_refused")
class ComparesTheFirstFeatures(Similar):
    def before(self, student, teacher):
        if student.features is None or teacher.features is None:
            return student, teacher
        width = min(student.features.shape[-1], teacher.features.shape[-1])
        return tuple(features_mapped(view, lambda f: f[..., :width]) for view in (student, teacher))


@caught_by("half_precision_geometry_is_refused")
class TakesAnyPrecisionOfGeometry(Near):
    def before(self, student, teacher):
        return tuple(matrix_mapped(view, self.single) for view in (student, teacher))

    def single(self, matrix):
        return matrix if matrix.dtype == torch.float64 else matrix.float()


@caught_by("views_of_other_sources_are_refused")
class BelievesTheStudentsSourceSize(Near):
    def before(self, student, teacher):
        if student.geometry is None or teacher.geometry is None:
            return student, teacher
        size = student.geometry.source_size
        return student, teacher._replace(geometry=teacher.geometry._replace(source_size=size))


# Symmetries of features


@caught_by("student_tokens_may_be_permuted")
class CostsMoreForLaterStudentTokens(Similar):
    def after(self, found, student, teacher):
        place = torch.arange(found.cost.shape[1], device=found.cost.device)
        return found._replace(cost=found.cost + 0.1 * place)


@caught_by("teacher_tokens_may_be_permuted")
class CostsMoreForLaterTeacherTokens(Similar):
    def after(self, found, student, teacher):
        return found._replace(cost=found.cost + 0.1 * found.teacher_index.sum(-1))


@caught_by("features_may_be_rotated")
class WeighsEveryOtherFeatureTwice(Similar):
    def before(self, student, teacher):
        return tuple(features_mapped(view, self.scaled) for view in (student, teacher))

    def scaled(self, features):
        return features * (1 + torch.arange(features.shape[-1], device=features.device) % 2)


@caught_by("features_may_be_scaled")
class ForgetsTheStudentsNorm(Similar):
    def after(self, found, student, teacher):
        length = torch.linalg.vector_norm(student.features.to(found.cost.dtype), dim=-1)
        return cost_changed(found, 1 - length * (1 - found.cost))


@caught_by("geometry_does_not_matter")
class AddsTheDistanceIfItIsKnown(Similar):
    def after(self, found, student, teacher):
        if student.geometry is None or teacher.geometry is None or found.weight.shape[2] == 0:
            return found
        theirs = wide_centers(teacher.geometry, teacher.grid).detach()
        chosen = theirs.gather(1, found.teacher_index.expand(-1, -1, 2))
        apart = wide_centers(student.geometry, student.grid).detach() - chosen
        return cost_changed(found, found.cost + apart.norm(dim=-1))


@caught_by("ties_go_to_the_lowest_index")
class TakesTheLastOfEqualTokens(Similar):
    def after(self, found, student, teacher):
        t = teacher.num_tokens
        if t == 0:
            return found
        theirs = teacher.features
        chosen = theirs.gather(1, found.teacher_index.expand(-1, -1, theirs.shape[2]))
        equal = (theirs[:, None] == chosen[:, :, None]).all(-1)
        last = t - 1 - equal.flip(-1).to(torch.int64).argmax(-1, keepdim=True)
        index = torch.where(equal.any(-1, keepdim=True), last, found.teacher_index)
        return found._replace(teacher_index=index)


# Both kinds


@caught_by("a_view_matches_itself")
class DropsExactCopies(Similar):
    def after(self, found, student, teacher):
        keep = (found.cost > 1e-5) | (teacher.num_tokens == 1)
        return Matches(
            found.teacher_index,
            torch.where(keep[..., None], found.weight, 0.0),
            torch.where(keep, found.cost, torch.inf),
        )


# Symmetries of places


def _places(found, student, teacher):
    """Source centres (b, s, 2) of the student tokens and of what they match, and the larger cells'
    diagonals (b, s)."""
    index = found.teacher_index
    ours = wide_centers(student.geometry, student.grid).detach()
    theirs = wide_centers(teacher.geometry, teacher.grid).detach()
    theirs = theirs.gather(1, index.expand(-1, -1, 2))
    diagonals = wide_diagonals(teacher.geometry, teacher.grid).detach().gather(1, index[..., 0])
    larger = torch.maximum(diagonals, wide_diagonals(student.geometry, student.grid).detach())
    return ours, theirs, larger


class CostOfPlaces(Near):
    """A cost of its own, worked out from the places of the matched tokens."""

    def cost(self, ours, theirs, larger):
        raise NotImplementedError

    def after(self, found, student, teacher):
        if found.weight.shape[2] == 0 or found.weight.shape[1] == 0:
            return found
        return cost_changed(found, self.cost(*_places(found, student, teacher)))


@caught_by("the_student_view_may_be_flipped")
class CostsMoreDownTheStudentsDiagonal(Near):
    def after(self, found, student, teacher):
        place = torch.arange(found.cost.shape[1], device=found.cost.device)
        diagonal = place // student.grid.cols + place % student.grid.cols
        return found._replace(cost=found.cost + 0.1 * diagonal)


@caught_by("the_teacher_view_may_be_flipped")
class CostsMoreDownTheTeachersDiagonal(Near):
    def after(self, found, student, teacher):
        place = found.teacher_index.sum(-1)
        diagonal = place // teacher.grid.cols + place % teacher.grid.cols
        return found._replace(cost=found.cost + 0.1 * diagonal)


@caught_by("the_views_may_be_transposed")
class CostsMoreInLowerRows(Near):
    def after(self, found, student, teacher):
        place = torch.arange(found.cost.shape[1], device=found.cost.device)
        return found._replace(cost=found.cost + 0.1 * (place // student.grid.cols))


@caught_by("the_source_may_be_shifted")
class PrefersTheMiddleOfTheSource(Near):
    def after(self, found, student, teacher):
        places = wide_centers(student.geometry, student.grid).detach()
        size = student.geometry.source_size.flip(-1)[:, None]
        return found._replace(cost=found.cost + (places / size - 0.5).abs().sum(-1))


@caught_by("the_source_may_be_enlarged")
class MeasuresInSourcePixels(CostOfPlaces):
    def cost(self, ours, theirs, larger):
        return (ours - theirs).norm(dim=-1)


@caught_by("the_source_may_be_mirrored")
class AddsTheDifferencesUp(CostOfPlaces):
    def cost(self, ours, theirs, larger):
        return (ours - theirs).sum(-1).abs() / larger


@caught_by("the_source_may_be_transposed")
class MeasuresAcrossAlone(CostOfPlaces):
    def cost(self, ours, theirs, larger):
        return (ours - theirs)[..., 0].abs() / larger


@caught_by("the_views_resolution_does_not_matter")
class ForgetsTheStride(Near):
    def after(self, found, student, teacher):
        stride = student.grid.stride
        return found._replace(cost=found.cost * (stride[0] ** 2 + stride[1] ** 2) ** 0.5)


@caught_by("the_heaviest_answer_lies_where_the_token_does")
class AlignsTheCorners(Near):
    """Its first and last tokens lie on the view's edges, as in a linspace from 0 to its width."""

    def before(self, student, teacher):
        return tuple(
            view if view.grid is None else view._replace(grid=self.stretched(view.grid))
            for view in (student, teacher)
        )

    def stretched(self, grid):
        (stride_x, offset_x), (stride_y, offset_y) = (
            # a single token stays in the middle
            (n * stride / (n - 1), 0.0) if n > 1 else (stride, offset)
            for n, stride, offset in zip(grid[1::-1], grid.stride, grid.offset, strict=True)
        )
        return grid._replace(stride=(stride_x, stride_y), offset=(offset_x, offset_y))

    def after(self, found, student, teacher):
        """What lies in padding is known by where it truly lies."""
        if found.weight.shape[2] == 0:
            return found
        ours, theirs = (
            source_valid(view.geometry, view.grid).detach() for view in (student, teacher)
        )
        good = ours & theirs.gather(1, found.teacher_index[..., 0])
        return Matches(
            found.teacher_index,
            torch.where(good[..., None], found.weight, 0.0),
            torch.where(good, found.cost, torch.inf),
        )


@caught_by("views_far_apart_do_not_match")
class KnowsNoLimit(Near):
    def __init__(self):
        super().__init__()
        self.right = PlainNearest(max_distance=float("inf"))


@caught_by("features_do_not_matter")
class DropsTokensWithNanFeatures(Near):
    def after(self, found, student, teacher):
        if student.features is None:
            return found
        good = ~student.features.isnan().any(-1)
        return Matches(
            found.teacher_index,
            torch.where(good[..., None], found.weight, 0.0),
            torch.where(good, found.cost, torch.inf),
        )


@caught_by("ties_of_places_go_to_the_lowest_index")
class TakesTheLastOfTheNearest(Near):
    def __init__(self):
        super().__init__()
        self.right = PlainNearest(last=True)
