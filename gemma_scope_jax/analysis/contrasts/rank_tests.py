"""Rank tests of many features at once, whose p-values hold where most values are equal.

The normal approximation does not hold there. A latent that fires in three of 110 prompts, all of them among the ten
of the first set, would have p = 4e-8, though of such latents one in 1,800 does so by chance. What it calls
significant is therefore tested anew by shuffling the sets, which is exact whatever is equal.

Shapes: N prompts, A of the first set and B of the second (A = B = N where they are pairs), M features, C of them that
are shuffled, R shuffles at a time.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

_NUMBERS = 2**23  # So many exist at a time.


def labelings(first: int, second: int, is_paired: bool) -> int:
    """In how many ways prompts can be divided into two sets, or pairs be turned around."""
    return 2**first if is_paired else math.comb(first + second, first)


def smallest_p(first: int, second: int, is_paired: bool, shuffles: int) -> float:
    """No two-sided p is below this: all ways are gone through where they are no more than `shuffles`."""
    ways = labelings(first, second, is_paired)
    return 2 / (ways if ways <= shuffles else shuffles + 1)


def prompts_needed(p: float, is_paired: bool) -> int:
    """How many prompts of each set, or pairs, there have to be for a p as small as this."""
    return next(n for n in itertools.count(1) if 2 / labelings(n, n, is_paired) <= p)


def auroc(first_AxM: np.ndarray, second_BxM: np.ndarray, is_paired: bool) -> np.ndarray:
    """Of all pairs of a prompt of the first set and one of the second the share in which the first's value is larger.

    Equal ones count half. Where prompts are `is_paired`, of those pairs alone.
    """
    if is_paired:
        return ((first_AxM > second_BxM) + 0.5 * (first_AxM == second_BxM)).mean(0)
    a, b = len(first_AxM), len(second_BxM)
    ranks_AxM = stats.rankdata(np.concatenate([first_AxM, second_BxM]), axis=0)[:a]
    return (ranks_AxM.sum(0) - a * (a + 1) / 2) / (a * b)


def p_values(
    first_AxM: np.ndarray,
    second_BxM: np.ndarray,
    is_paired: bool,
    rate: float,
    shuffles: int,
    seed: int,
) -> np.ndarray:
    """Two-sided p-values [M]: of Mann and Whitney's test, of pairs of Wilcoxon's signed-rank test.

    SciPy's normal approximation where that is above the rate. All others are twice the share of labelings with a rank
    sum that is as far out on its side: of all of them, or of as many random ones as `shuffles` says.
    """
    if is_paired:
        ranks_NxM, observed_M, p_M = _signed_ranks(first_AxM - second_BxM)
    else:
        both_NxM = np.concatenate([first_AxM, second_BxM])
        ranks_NxM = stats.rankdata(both_NxM, axis=0)
        observed_M = ranks_NxM[: len(first_AxM)].sum(0)
        p_M = stats.mannwhitneyu(first_AxM, second_BxM, axis=0, method="asymptotic").pvalue
        p_M = np.where((both_NxM == both_NxM[:1]).all(0), 1.0, p_M)
    chosen = np.flatnonzero(p_M <= rate)
    if chosen.size:
        sizes = (len(first_AxM), len(second_BxM), is_paired)
        p_M[chosen] = _by_shuffling(ranks_NxM[:, chosen], observed_M[chosen], *sizes, shuffles, seed)
    return p_M


def _signed_ranks(difference_NxM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of the differences' sizes, 0 of those that are none; their sums over positive ones; SciPy's p-values."""
    is_none_NxM = difference_NxM == 0
    ranks_NxM = stats.rankdata(np.abs(difference_NxM), axis=0) - is_none_NxM.sum(0)[None]
    ranks_NxM = np.where(is_none_NxM, 0, ranks_NxM)
    p_M = np.ones(difference_NxM.shape[1])
    differs_M = ~is_none_NxM.all(0)
    if differs_M.any():
        p_M[differs_M] = stats.wilcoxon(difference_NxM[:, differs_M], axis=0, method="asymptotic").pvalue
    return ranks_NxM, np.where(difference_NxM > 0, ranks_NxM, 0).sum(0), p_M


def _by_shuffling(
    ranks_NxC: np.ndarray,
    observed_C: np.ndarray,
    first: int,
    second: int,
    is_paired: bool,
    shuffles: int,
    seed: int,
) -> np.ndarray:
    ways = labelings(first, second, is_paired)
    block = max(_NUMBERS // max(ranks_NxC.shape), 1)
    if ways <= shuffles:
        labels = _all_labels(first, second, is_paired, block)
        observed_too, total = 0, ways
    else:
        labels = _random_labels(first, second, is_paired, block, shuffles, np.random.default_rng(seed))
        # The labels as they are count as one more, or p could be 0.
        observed_too, total = 1, shuffles + 1
    above_C, below_C = (np.full(len(observed_C), observed_too) for _ in range(2))
    for in_first_RxN in labels:
        # Ranks are whole or halves: these sums are exact, and equal ones are equal.
        sums_RxC = in_first_RxN.astype(np.float64) @ ranks_NxC
        above_C += (sums_RxC >= observed_C[None]).sum(0)
        below_C += (sums_RxC <= observed_C[None]).sum(0)
    return np.minimum(2 * np.minimum(above_C, below_C) / total, 1.0)


def _all_labels(first: int, second: int, is_paired: bool, block: int) -> Iterator[np.ndarray]:
    """Every way [R, N] to say which prompts are of the first set, or of which pairs the difference is positive."""
    if is_paired:
        for start in range(0, 2**first, block):
            numbers_R = np.arange(start, min(start + block, 2**first))
            yield (numbers_R[:, None] >> np.arange(first)[None]) & 1
        return
    n = first + second
    for some in itertools.batched(itertools.combinations(range(n), first), block):
        labels_RxN = np.zeros((len(some), n), bool)
        np.put_along_axis(labels_RxN, np.array(some), True, axis=1)
        yield labels_RxN


def _random_labels(
    first: int, second: int, is_paired: bool, block: int, count: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    for start in range(0, count, block):
        size = min(block, count - start)
        if is_paired:
            yield rng.random((size, first)) < 0.5
        else:
            sets_RxN = np.broadcast_to(np.arange(first + second) < first, (size, first + second))
            yield rng.permuted(sets_RxN, axis=1)
