"""Rank tests of many features at once, with p-values that are valid when most values are equal.

The normal approximation fails with many ties. For a latent that fires in three of 110 prompts, all among the ten of
the first set, it has p = 4e-8, but by chance one in 1,800 such latents does so. Features that are significant by
the approximation are therefore tested again by permuting the labels, which is exact with any ties.

Shapes: N prompts, A of the first set and B of the second (A = B = N for pairs), M features, C features that are
tested by permutation, R permutations at a time.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

_NUMBERS = 2**23  # The largest number of array elements held at a time.


def labelings(first: int, second: int, is_paired: bool) -> int:
    """The number of ways to divide the prompts into two sets, or to swap the prompts within pairs."""
    return 2**first if is_paired else math.comb(first + second, first)


def smallest_p(first: int, second: int, is_paired: bool, shuffles: int) -> float:
    """The smallest possible two-sided p. All labelings are used if there are at most `shuffles` of them."""
    ways = labelings(first, second, is_paired)
    return 2 / (ways if ways <= shuffles else shuffles + 1)


def prompts_needed(p: float, is_paired: bool) -> int:
    """The number of prompts per set, or of pairs, needed for a p-value as small as `p`."""
    return next(n for n in itertools.count(1) if 2 / labelings(n, n, is_paired) <= p)


def auroc(first_AxM: np.ndarray, second_BxM: np.ndarray, is_paired: bool) -> np.ndarray:
    """The fraction of pairs, one prompt from each set, in which the first prompt's value is larger.

    Ties count half. If `is_paired`, only the given pairs are counted.
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
    """Two-sided p-values [M] of the Mann-Whitney test, or of Wilcoxon's signed-rank test for pairs.

    A p-value above the rate is SciPy's normal approximation. Any other is twice the fraction of labelings with a rank
    sum at least as extreme on the same side, over all labelings or over `shuffles` random ones.
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
    """Ranks of absolute differences (0 for no difference), rank sums of positive ones, and SciPy's p-values."""
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
        # The observed labels count as one labeling more, because p must not be 0.
        observed_too, total = 1, shuffles + 1
    above_C, below_C = (np.full(len(observed_C), observed_too) for _ in range(2))
    for in_first_RxN in labels:
        # Ranks are multiples of ½, so the sums are exact and comparing them for equality is safe.
        sums_RxC = in_first_RxN.astype(np.float64) @ ranks_NxC
        above_C += (sums_RxC >= observed_C[None]).sum(0)
        below_C += (sums_RxC <= observed_C[None]).sum(0)
    return np.minimum(2 * np.minimum(above_C, below_C) / total, 1.0)


def _all_labels(first: int, second: int, is_paired: bool, block: int) -> Iterator[np.ndarray]:
    """All labelings, in blocks [R, N]: which prompts are in the first set, or which pairs are positive."""
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
