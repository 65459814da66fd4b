"""Rank tests of many features at once, compared with SciPy and scikit-learn column by column."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from gemma_scope_jax.analysis.contrasts import rank_tests


def features(first, second, seed=0):
    """Seven features: dense, shifted, with ties, with many zeros, mostly one value, constant, and zero."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(first + second, 7)) + 3
    made[:first, 1] += 1.5
    made[:, 2] = np.round(made[:, 2])
    made[:, 3] = np.where(np.arange(first + second) % 5 < 2, 0, made[:, 3])
    made[2:, 4] = 3.0
    made[:, 5], made[:, 6] = 2.0, 0.0
    return made[:first], made[first:]


def test_auroc_equals_scikit_learn():
    first, second = features(6, 9)
    labels = np.repeat([1, 0], [6, 9])
    both = np.concatenate([first, second])
    expected = [roc_auc_score(labels, both[:, i]) for i in range(7)]
    np.testing.assert_allclose(rank_tests.auroc(first, second, False), expected, rtol=1e-12)


def test_auroc_of_pairs_counts_only_the_pairs():
    first, second = np.array([[1.0], [2.0], [0.0], [5.0]]), np.array([[0.0], [2.0], [3.0], [4.0]])
    assert rank_tests.auroc(first, second, True).tolist() == [(1 + 0.5 + 0 + 1) / 4]


def scipys_exact(first, second, is_paired):
    """The p of SciPy's permutation test over all labelings, column by column."""
    if is_paired:

        def statistic(x, y):
            return stats.wilcoxon(x - y, alternative="greater", method="asymptotic").statistic

        return [
            stats.permutation_test((a, b), statistic, permutation_type="samples", n_resamples=np.inf).pvalue
            if (a != b).any()
            else 1
            for a, b in zip(first.T, second.T, strict=True)
        ]

    def statistic(x, y, axis):
        return stats.rankdata(np.concatenate([x, y], axis), axis=axis)[..., : x.shape[axis]].sum(axis)

    return [
        stats.permutation_test((a, b), statistic, vectorized=True, n_resamples=np.inf).pvalue
        for a, b in zip(first.T, second.T, strict=True)
    ]


@pytest.mark.parametrize(("first", "second", "is_paired"), [(5, 6, False), (3, 9, False), (7, 7, True)])
def test_p_equals_scipys_exact_p_over_all_labelings(first, second, is_paired):
    sets = features(first, second)
    expected = scipys_exact(*sets, is_paired)
    found = rank_tests.p_values(*sets, is_paired, 0.99, 10**6, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert 2 / rank_tests.labelings(first, second, is_paired) <= min(found) < max(found) == 1
    # Many parts return the same as one part.
    rank_tests._NUMBERS, whole = 40, rank_tests._NUMBERS
    try:
        np.testing.assert_array_equal(rank_tests.p_values(*sets, is_paired, 0.99, 10**6, 0), found)
    finally:
        rank_tests._NUMBERS = whole


def test_p_is_scipys_approximation_where_it_exceeds_the_rate():
    first, second = features(12, 15)
    expected = [
        stats.mannwhitneyu(a, b, method="asymptotic").pvalue for a, b in zip(first.T, second.T, strict=True)
    ]
    np.testing.assert_allclose(rank_tests.p_values(first, second, False, 1e-9, 100, 0)[:5], expected[:5])
    assert rank_tests.p_values(first, second, False, 1e-9, 100, 0)[5:].tolist() == [1, 1]
    difference = (first - second[:12])[:, :5]
    expected = [stats.wilcoxon(column, method="asymptotic").pvalue for column in difference.T]
    paired = rank_tests.p_values(first, second[:12], True, 1e-9, 100, 0)
    np.testing.assert_allclose(paired[:5], expected)
    assert paired[5:].tolist() == [1, 1]


@pytest.mark.parametrize("is_paired", [False, True])
def test_random_shuffles_approximate_the_exact_p_and_reach_the_smallest(is_paired):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 18, 4)) + np.array([[[0.9, 0.6, 0.3, 9.0]], [[0, 0, 0, 0.0]]])
    test = stats.wilcoxon if is_paired else stats.mannwhitneyu
    expected = [
        test(a, b, method="exact").pvalue for a, b in zip(first[:, :3].T, second[:, :3].T, strict=True)
    ]
    shuffles = 40_000
    found = rank_tests.p_values(first, second, is_paired, 0.9, shuffles, 0)
    for p, exact in zip(found, expected, strict=False):
        assert abs(p - exact) < 4 * 2 * math.sqrt(exact / 2 / shuffles) + 2 / shuffles
    assert found[3] == rank_tests.smallest_p(18, 18, is_paired, shuffles) == 2 / (shuffles + 1)
    assert (found == rank_tests.p_values(first, second, is_paired, 0.9, shuffles, 0)).all()
    assert (found != rank_tests.p_values(first, second, is_paired, 0.9, shuffles, 1))[:3].any()


def test_three_firings_in_a_small_set_have_the_exact_p():
    """By hand: three of 110 prompts are all in the set of ten with p = 10 · 9 · 8 / (110 · 109 · 108)."""
    first, second = np.zeros((10, 1)), np.zeros((100, 1))
    first[:3, 0] = [1, 2, 3]
    assert stats.mannwhitneyu(first, second, method="asymptotic").pvalue < 1e-7
    shuffles = 200_000
    (p,) = rank_tests.p_values(first, second, False, 0.05, shuffles, 0)
    exact = 2 * 10 * 9 * 8 / (110 * 109 * 108)
    assert abs(p - exact) < 4 * 2 * math.sqrt(exact / 2 / shuffles)


def test_the_number_of_prompts_needed_for_a_p():
    assert rank_tests.labelings(4, 4, False) == 70 and rank_tests.labelings(4, 4, True) == 16
    assert rank_tests.smallest_p(4, 4, False, 1000) == 2 / 70
    assert rank_tests.smallest_p(4, 4, False, 49) == 2 / 50
    assert rank_tests.prompts_needed(0.05, False) == 4  # Three prompts each have only 20 labelings.
    assert rank_tests.prompts_needed(0.05, True) == 6
