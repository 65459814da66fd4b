"""Random halves of two sets of prompts: one half to choose latents on, the other to measure them on."""

import math
from collections.abc import Sequence

import numpy as np


def halves(
    first: Sequence[str], second: Sequence[str], is_paired: bool = False, seed: int = 0
) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """Splits both sets at random: one half of each to choose latents on, the other to measure their effect on.

    If `is_paired`, pairs stay together. For an odd number of prompts, the first half has one more.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(first)), rng.permutation(len(second))]
    if is_paired:
        orders[1] = orders[0]
    parts = []
    for prompts, order in zip((first, second), orders, strict=True):
        middle = math.ceil(len(order) / 2)
        parts.append([[prompts[i] for i in some] for some in (order[:middle], order[middle:])])
    (first_a, first_b), (second_a, second_b) = parts
    return (first_a, second_a), (first_b, second_b)
