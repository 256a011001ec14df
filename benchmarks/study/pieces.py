"""What has to be run: pieces, and tasks of pieces that share their views."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.study.settings import Preset, Study

__all__ = ["UNTRAINED", "Piece", "final_pieces", "tasks_of"]

# A backbone with the weights that training starts from: the level that has to be beaten.
UNTRAINED = "untrained"


class Piece(NamedTuple):
    """One training and its evaluation.

    Attributes:
        study: name of the study.
        role: "tune", tested on validation scenes, or "final", on test scenes.
        variant: what is trained.
        share: of the scenes.
        seed: of everything that is random.
        lr: peak learning rate.
        temp: temperature of the teacher, or of the contrast.
    """

    study: str
    role: str
    variant: str
    share: float
    seed: int
    lr: float
    temp: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Piece:
        """The piece that a record is of."""
        return cls(*(record[field] for field in cls._fields))


def final_pieces(study: Study, chosen: Mapping[str, tuple[float, float]]) -> list[Piece]:
    """Every variant at every share with every seed, seed by seed, and the untrained backbone.

    Args:
        study: the study.
        chosen: by variant the learning rate and the temperature.
    """
    pieces = []
    for seed, share in itertools.product(study.seeds, study.shares):
        if share == study.shares[0]:
            pieces.append(Piece(study.name, "final", UNTRAINED, 0.0, seed, 0.0, 0.0))
        pieces += [
            Piece(study.name, "final", variant, share, seed, *chosen[variant])
            for variant in study.variants
        ]
    return pieces


def tasks_of(preset: Preset, pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces that share their views together, in the order in which they are to be run.

    Tuning is cut by what is tried as well, so that several processes can share it; finals go seed
    by seed over all studies, first at the smallest and the largest share, then at each of those
    between, so that what is there after a while are whole seeds of what tells most.
    """
    order = [study.name for study in preset.studies]

    def key(piece: Piece) -> tuple[Any, ...]:
        if piece.role == "tune":
            return 0, order.index(piece.study), (piece.share, piece.seed), (piece.lr, piece.temp)
        # the untrained backbone goes with its seed's first share
        study = preset.study(piece.study)
        share = piece.share or study.shares[0]
        between = share if min(study.shares) < share < max(study.shares) else 0.0
        return 1, between, study.seeds.index(piece.seed), order.index(piece.study), share

    ordered = sorted(pieces, key=key)
    return [list(group) for _, group in itertools.groupby(ordered, key)]
