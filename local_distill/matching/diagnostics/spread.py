"""How matches spread over the tokens: no geometry and no features are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._check import Axes, check_at_least
from local_distill._precision import at_least_float32, widest
from local_distill.kernels import block_length
from local_distill.matching._match_checks import check_matches, check_targets
from local_distill.matching.diagnostics._means import matched_tokens, mean_of, share
from local_distill.matching.mutual import mutual_matches
from local_distill.structures import Matches

__all__ = ["coverage", "distinct_targets", "entropy", "hubness", "mutual_rate"]


def coverage(matches: Matches) -> Tensor:
    r"""Share of the student tokens that have a match.

    .. math:: |\{(n, i): \textstyle\sum_k w_{nik} > 0\}| / (b s)

    Args:
        matches: (b, s, k), any k.

    Returns:
        0-d, in [0, 1]; 0 where there are no student tokens.

    Raises:
        ShapeError: axes that do not belong together.

    Example:
        >>> coverage(Matches.identity(torch.tensor([[True, False], [True, True]])))
        tensor(0.7500)
    """
    matches = check_matches("matches", matches, Axes())
    matched = matched_tokens(matches)
    return share(matched, torch.ones_like(matched), at_least_float32(matches.weight).dtype)


def distinct_targets(matches: Matches, num_teacher_tokens: int) -> Tensor:
    r"""How many different teacher tokens the matched student tokens name, of as many as they could.

    .. math:: \text{mean}_n\; |\{j(n, i): i \text{ matched}\}| / \min(m_n, t)

    with j the heaviest candidate (ties: the first) and m the image's number of matched tokens.

    Convention: 1 means that all name different tokens, or, where the teacher has fewer tokens than
    are matched, that each teacher token is named. Division by m alone would never reach 1 there,
    and the number would tell grid sizes instead of collapse. Images without a match take no part:
    `coverage` counts those.

    Args:
        matches: (b, s, k), any k.
        num_teacher_tokens: t.

    Returns:
        0-d, in [0, 1]; 0 where no image has a match.

    Raises:
        ShapeError: axes that do not belong together, or an index of t and above (seen where that
            needs no device sync).
        ConfigError: ``num_teacher_tokens`` is no whole number of at least 0.

    Example:
        >>> index = torch.tensor([[[0], [0], [3], [0]]])
        >>> distinct_targets(Matches(index, torch.ones(1, 4, 1), torch.zeros(1, 4)), 9)
        tensor(0.5000)
    """
    matches = _against("matches", matches, num_teacher_tokens)
    b, _, k = matches.weight.shape
    like = at_least_float32(matches.weight)
    if k == 0:
        return like.new_zeros(())
    matched = matched_tokens(matches)
    heaviest = matches.teacher_index.gather(2, matches.weight.argmax(-1, keepdim=True))[..., 0]
    # Tokens without a match name a column of their own.
    named = torch.zeros((b, num_teacher_tokens + 1), dtype=torch.bool, device=like.device)
    named = named.scatter(1, torch.where(matched, heaviest, num_teacher_tokens), True)
    count = named[:, :num_teacher_tokens].sum(1)
    possible = matched.sum(1).clamp(1, max(1, num_teacher_tokens))
    return mean_of(count.to(like.dtype) / possible, matched.any(1))


def hubness(matches: Matches, num_teacher_tokens: int) -> Tensor:
    r"""Skewness of how much weight the teacher tokens receive: high where a few answer for all.

    .. math:: \text{mean}_n\; E_j[(N_{nj} - \mu_n)^3] / \sigma_n^3, \quad
        N_{nj} = \sum_{i,k: j_{nik} = j} w_{nik}

    with μ and σ the mean and the standard deviation of N over the image's t tokens.

    Convention: with k equal weights N is the k-occurrence divided by k, which has the same
    skewness. 0 where all receive the same but for rounding (σ up to 4 ε μ). Images without a match
    take no part.

    Args:
        matches: (b, s, k), any k.
        num_teacher_tokens: t.

    Returns:
        0-d; 0 where no image has a match.

    Raises:
        ShapeError: axes that do not belong together, or an index of t and above (seen where that
            needs no device sync).
        ConfigError: ``num_teacher_tokens`` is no whole number of at least 0.

    Example:
        >>> index = torch.tensor([[[0], [0], [0], [0]]])
        >>> hubness(Matches(index, torch.ones(1, 4, 1), torch.zeros(1, 4)), 5)  # N = 4, 0, 0, 0, 0
        tensor(1.5000)

    Source: Radovanović, Nanopoulos, Ivanović, "Hubs in Space" (JMLR 2010).
    """
    matches = _against("matches", matches, num_teacher_tokens)
    like = at_least_float32(matches.weight)
    if num_teacher_tokens == 0:
        return like.new_zeros(())
    received = _received(matches, num_teacher_tokens)
    mean = received.mean(1, keepdim=True)
    centred = received - mean
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    spread = deviation > 4 * torch.finfo(like.dtype).eps * mean
    # Divided before the cube is taken, which could vanish.
    skewness = (centred / torch.where(spread, deviation, 1.0)).pow(3).mean(1)
    skewness = torch.where(spread[:, 0], skewness, 0.0)
    return mean_of(skewness, matched_tokens(matches).any(1)).to(like.dtype)


def entropy(matches: Matches) -> Tensor:
    r"""Mean entropy of the matched tokens' weights, in nats: 0 for hard matches.

    .. math:: \text{mean}_{(n, i)\ \text{matched}} \; -\sum_j p_{nij} \log p_{nij}, \quad
        p_{nij} = \sum_{k: j_{nik} = j} w_{nik} \big/ \sum_k w_{nik}

    Convention: weights are normalised, so a weak match is as sure as a strong one. Candidates that
    name the same teacher token count as one: `Matches.gather` cannot tell them apart either.

    Args:
        matches: (b, s, k), any k.

    Returns:
        0-d, from 0 to log of the candidates' number; 0 where no token is matched.

    Raises:
        ShapeError: axes that do not belong together.

    Example:
        >>> index = torch.tensor([[[0, 1], [2, 2]]])  # log 2, and 0
        >>> entropy(Matches(index, torch.full((1, 2, 2), 0.5), torch.zeros(1, 2)))
        tensor(0.3466)
    """
    matches = check_matches("matches", matches, Axes())
    b, s, k = matches.weight.shape
    like = at_least_float32(matches.weight)
    if matches.weight.numel() == 0:
        return like.new_zeros(())
    # Per candidate: sorted index and order, place, and about three numbers.
    block = block_length(48 * b * k, like.device)
    entropies = [
        _entropies(
            matches.teacher_index[:, start : start + block],
            matches.weight[:, start : start + block],
        )
        for start in range(0, s, block)
    ]
    return mean_of(torch.cat(entropies, 1), matched_tokens(matches)).to(like.dtype)


def mutual_rate(matches: Matches, reverse: Matches) -> Tensor:
    r"""Share of the matched student tokens that stay under `mutual_matches`.

    .. math:: |\text{matched and mutual}| / |\text{matched}|, \text{ over the whole batch}

    Args:
        matches: student → teacher, (b, s, k).
        reverse: teacher → student, (b, t, k').

    Returns:
        0-d, in [0, 1]; 0 where no token is matched.

    Raises:
        ShapeError: as `mutual_matches`.

    Example:
        >>> both = Matches.identity(torch.ones(1, 2, dtype=torch.bool))
        >>> one = Matches.identity(torch.tensor([[True, False]]))
        >>> mutual_rate(both, one), mutual_rate(one, both)
        (tensor(0.5000), tensor(1.))
    """
    stay = matched_tokens(mutual_matches(matches, reverse))
    return share(stay, matched_tokens(matches), at_least_float32(matches.weight).dtype)


def _against(name: str, matches: Matches, num_teacher_tokens: int) -> Matches:
    check_at_least("num_teacher_tokens", num_teacher_tokens, 0)
    matches = check_matches(name, matches, Axes())
    check_targets(name, matches.teacher_index, num_teacher_tokens, "`num_teacher_tokens`")
    return matches


def _received(matches: Matches, t: int) -> Tensor:
    """(b, t) weight that each teacher token receives, in the widest type."""
    index, weight, _ = matches
    b, s, k = weight.shape
    total = widest(weight.new_zeros(b, t))
    block = block_length(24 * b * k, weight.device)  # the index and the weight, copied, and a rest
    for start in range(0, s, block):
        part = _positive(weight[:, start : start + block])
        places = index[:, start : start + block].flatten(1)
        total = total.scatter_add(1, places, part.flatten(1))
    return total


def _entropies(index: Tensor, weight: Tensor) -> Tensor:
    """(b, n) entropy of each token's weights, summed over candidates of one teacher token."""
    index, order = index.sort(dim=-1)
    weight = _positive(weight).gather(2, order)
    mass = weight.sum(-1, keepdim=True)
    probs = weight / torch.where(mass > 0, mass, 1.0)
    # Equal indices are neighbours now; a new place begins where the index changes.
    changes = (index[..., 1:] != index[..., :-1]).to(torch.int64)
    place = torch.nn.functional.pad(changes.cumsum(-1), (1, 0))
    merged = torch.zeros_like(probs).scatter_add(2, place, probs)
    summed: Tensor = torch.special.entr(merged).sum(-1)
    return summed.clamp_min(0.0)


def _positive(weight: Tensor) -> Tensor:
    return torch.where(weight > 0, widest(weight), 0.0)
