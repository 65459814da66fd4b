"""Descriptions of the tokens that passages of text have in common: the last token, and the tokens before it.

R rows, L context length, V tokens that occur, N passages of W tokens. Positions are numbered across all rows, as
row · L + column.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from gemma_scope_jax.models import masking
from gemma_scope_jax.runtime.errors import InputError

BEFORE = 8  # Tokens of a passage before its last token.
PRIOR = 1.0  # Prior occurrences of each token; see `Description`.
WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0)  # Candidate weights of the tokens before; see `describe`.


class Text(NamedTuple):
    """Rows of tokens, with the position and the half of each token."""

    tokens_RxL: np.ndarray  # indices into `vocabulary_V`
    vocabulary_V: np.ndarray  # the ids of the tokens that occur
    position_RxL: np.ndarray  # the distance from the segment's BOS
    half_RxL: np.ndarray  # 0: for descriptions, 1: for testing, -1: does not count


def divide(tokens_RxL: np.ndarray, first_document_R: np.ndarray, prefix: int) -> Text:
    """Divides whole documents into two halves with about the same number of positions.

    Args:
      tokens_RxL: packed rows.
      first_document_R: the number of the document that each row begins with; see `packing.pack`.
      prefix: the length of the user prefix, which does not count; see `masking.is_kept`.

    Raises:
      ValueError: if there are fewer than two documents.
    """
    document_RxL = first_document_R[:, None] + np.cumsum(tokens_RxL == masking.BOS, axis=1) - 1
    kept_RxL = np.asarray(masking.is_kept(jnp.asarray(tokens_RxL), prefix))
    numbers, sizes = np.unique(document_RxL[kept_RxL], return_counts=True)
    if len(numbers) < 2:
        raise InputError(
            f"the {len(tokens_RxL)} rows are of {len(numbers)} document, but two are needed; give more --rows"
        )
    half_of, filled = {}, [0, 0]
    for place in np.argsort(-sizes, kind="stable"):
        half = int(filled[1] < filled[0])
        half_of[numbers[place]] = half
        filled[half] += sizes[place]
    halves = np.array([half_of[number] for number in numbers])
    half_RxL = np.where(
        kept_RxL, halves[np.searchsorted(numbers, document_RxL).clip(max=len(numbers) - 1)], -1
    )
    vocabulary_V, places = np.unique(tokens_RxL, return_inverse=True)
    position_RxL = np.asarray(masking.packed_positions(jnp.asarray(tokens_RxL)))
    return Text(
        places.reshape(tokens_RxL.shape).astype(np.int32),
        vocabulary_V,
        position_RxL,
        half_RxL.astype(np.int8),
    )


def passages(text: Text, positions_N: np.ndarray) -> np.ndarray:
    """The tokens [N, W] that end at each position; -1 before the segment's BOS."""
    offsets_W = np.arange(-BEFORE, 1)
    places_NxW = np.maximum(positions_N[:, None] + offsets_W, 0)
    is_inside_NxW = offsets_W >= -text.position_RxL.reshape(-1)[positions_N][:, None]
    return np.where(is_inside_NxW, text.tokens_RxL.reshape(-1)[places_NxW], -1)


def _each_once(tokens_NxW: np.ndarray) -> np.ndarray:
    """The distinct tokens of each row, sorted; repeated tokens become -1."""
    ordered_NxW = np.sort(tokens_NxW, axis=1)
    return np.where(np.diff(ordered_NxW, axis=1, prepend=-1) == 0, -1, ordered_NxW)


class Counts(NamedTuple):
    """For each token, the number of passages in which it is the last, and in which it is among those before."""

    passages: int
    last_V: np.ndarray
    before_V: np.ndarray


def count(passages_NxW: np.ndarray, size: int) -> Counts:
    """Counts the tokens of passages, for a vocabulary of `size` tokens."""
    parts = (passages_NxW[:, -1], _each_once(passages_NxW[:, :-1]))
    return Counts(len(passages_NxW), *(np.bincount(part[part >= 0], minlength=size) for part in parts))


@dataclasses.dataclass(frozen=True)
class Description:
    """The lift of each token in some passages: the logarithm of its rate relative to other passages.

    The rate is a posterior mean: occurrences are Poisson, and the rate has a gamma prior of mean 1, worth `PRIOR`
    occurrences. So a token that occurs once has a small lift however rare it is, and a common token that is missing
    has a large negative one.
    """

    last_V: np.ndarray  # lifts as the last token
    before_V: np.ndarray  # lifts as one of the tokens before the last
    weight: float  # of the tokens before; the last token has weight 1

    def evidence(self, passages_NxW: np.ndarray) -> np.ndarray:
        """The weighted sum of lifts of each passage [N]: at weight 1 the log-odds under naive Bayes."""
        last_N, before_N = _parts((self.last_V, self.before_V), passages_NxW)
        return last_N + self.weight * before_N


def _parts(lift: tuple[np.ndarray, np.ndarray], passages_NxW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lift of the last token, and the sum of lifts over the tokens before it, [N] each."""
    before_V = np.append(lift[1], 0)  # The lift of -1, no token.
    return lift[0][passages_NxW[:, -1]], before_V[_each_once(passages_NxW[:, :-1])].sum(1)


def describe(passages_NxW: np.ndarray, elsewhere: Counts, silent_KxW: np.ndarray) -> Description:
    """Describes passages at which a latent fires.

    The tokens before the last are many, and mostly there by chance. Their weight is the one of `WEIGHTS` that best
    separates the passages from silent ones, with each passage left out of its own description.

    Args:
      passages_NxW: at least two passages.
      elsewhere: the token counts of random passages.
      silent_KxW: passages at which the latent does not fire.
    """
    seen = count(passages_NxW, len(elsewhere.last_V))

    def lifts(left_out: int) -> tuple[np.ndarray, np.ndarray]:
        share = (seen.passages - left_out) / elsewhere.passages
        return tuple(
            np.log((np.maximum(seen_V - left_out, 0) + PRIOR) / (share * elsewhere_V + PRIOR))
            for seen_V, elsewhere_V in zip(seen[1:], elsewhere[1:], strict=True)
        )

    # A passage adds one to the count of each of its tokens, so subtracting one leaves the passage out.
    own, others = _parts(lifts(1), passages_NxW), _parts(lifts(0), silent_KxW)
    weight = max(WEIGHTS, key=lambda w: auroc(own[0] + w * own[1], others[0] + w * others[1]))
    return Description(*lifts(0), weight)


def auroc(positive_N: np.ndarray, negative_K: np.ndarray) -> float:
    """The share of pairs in which the positive value is larger; ties count half."""
    n, k = len(positive_N), len(negative_K)
    ranks = stats.rankdata(np.concatenate([positive_N, negative_K]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * k))


def score(description: Description, firing_NxW: np.ndarray, silent_KxW: np.ndarray) -> float:
    """The AUROC with which a description separates passages at which a latent fires from silent ones."""
    return auroc(description.evidence(firing_NxW), description.evidence(silent_KxW))


def words(
    description: Description, text: Text, decode: Callable[[list[int]], str], most: int = 4
) -> dict[str, list[str]]:
    """The tokens with the largest lifts, as text: `on`, last tokens; `before`, tokens before, if they have weight."""

    def standing_out(lift_V: np.ndarray) -> list[str]:
        strongest = np.argsort(-lift_V, kind="stable")[:most]
        # A token seen once has a rate below 2.
        return [decode([int(text.vocabulary_V[v])]) for v in strongest if lift_V[v] > np.log(2)]

    before = standing_out(description.before_V) if description.weight else []
    return {"on": standing_out(description.last_V), "before": before}
