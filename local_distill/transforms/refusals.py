"""Ways out of a refusal, in the words that `track` and `upgrade` share."""

from __future__ import annotations

from local_distill.errors import GeometryError

__all__ = ["check_one_view", "vouch", "ways_out"]

_INSTEAD = (
    "give the pipelines inside of it to MultiView([({pipeline}, 2), ...]), or return the view and "
    "its geometry yourself, the geometry by from_box(...)"
)


def vouch(name: str) -> str:
    """What to write for a transform that moves no pixels.

    Example:
        >>> vouch("Brighten")
        'if it moves no pixels, vouch for it with `trust=[Brighten]`'
        >>> vouch("<lambda>")
        'if it moves no pixels, name the function (def brighten ...), then `trust=[brighten]`'
    """
    if name == "<lambda>":
        return (
            "if it moves no pixels, name the function (def brighten ...), then `trust=[brighten]`"
        )
    return f"if it moves no pixels, vouch for it with `trust=[{name}]`"


def ways_out(name: str, pipeline: str) -> str:
    """Why nothing can be said of a transform, and the ways out; ``pipeline``: how one is given.

    Example:
        >>> ways_out("Crops", "upgrade(pipeline)")
        'it is not known whether it moves pixels; if it moves no ...([(upgrade(pipeline), 2), ...'
    """
    return (
        f"it is not known whether it moves pixels; {vouch(name)}; if it moves pixels or makes "
        f"several views, {_INSTEAD.format(pipeline=pipeline)}"
    )


def check_one_view(view: object, pipeline: str) -> None:
    """Refuse what a transform made that was vouched for and makes several views.

    Raises:
        GeometryError: a list or a tuple.

    Example:
        >>> check_one_view([1, 2], "pipeline")
        Traceback (most recent call last):
        ...
        local_distill.errors.GeometryError: a transform that was vouched for in `trust` returned \
a list of 2, wanted one view: give the pipelines inside of it to MultiView([(pipeline, 2), ...])...
    """
    if isinstance(view, (list, tuple)):
        raise GeometryError(
            f"a transform that was vouched for in `trust` returned a {type(view).__name__} of "
            f"{len(view)}, wanted one view: {_INSTEAD.format(pipeline=pipeline)}"
        )
