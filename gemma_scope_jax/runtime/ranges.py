"""Ranges of valid numbers, and the error for a number out of range."""

import dataclasses
import math

from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included; with `or_zero` also 0. NaN and infinity are in no range."""

    low: float
    high: float
    or_zero: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high or (self.or_zero and value == 0)

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"{'0, or ' if self.or_zero else ''}at least {low} and at most {high}"


# Compiled programs count in int32.
LARGEST = 2**31 - 1
COUNT = Range(1, LARGEST)
COUNT_OR_NONE = Range(0, LARGEST)
WHOLE = Range(-LARGEST, LARGEST)
FEW = Range(1, 1000)  # For counts of things that each need a process, or memory for every latent.
NEW_TOKENS = Range(1, 2**20)
# JAX uses only 32 bits of a seed: 2³² would silently be 0.
SEED = Range(0, LARGEST)
SHARE = Range(0.0, 1.0)
# Numbers outside become 0 or infinity in float32, either at once or when they are multiplied.
POSITIVE = Range(1e-30, 1e30)
POSITIVE_OR_ZERO = Range(1e-30, 1e30, or_zero=True)
SIGNED = Range(-1e30, 1e30)
# Values are equal, except for rounding, if their variance is a smaller share of their mean square.
CONSTANT = 1e-9


def check(name: str, value: float, allowed: Range) -> None:
    """Raises ValueError, with the name, the value and the range, if the value is not in it."""
    if value not in allowed:
        raise InputError(f"{name} is {shown(value)}; it must be {allowed}")


def shown(value: float) -> str:
    """A number as it was given, shortened to fit in a line."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"about {'-' if value < 0 else ''}10^{int(math.log10(abs(value)))}"
    return printable(str(value), 40)
