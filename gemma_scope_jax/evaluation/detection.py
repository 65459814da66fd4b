"""Detection without a judge: whether the tokens common to a latent's strongest passages predict where else it fires.

Documents are divided into two halves. A description is made from a latent's strongest passages in the first half. In
the second half it ranks positions where the latent fires against positions where it does not.

Shapes are those of `token_descriptions`, with C candidate latents.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.data import token_rows
from gemma_scope_jax.display import tables
from gemma_scope_jax.evaluation import token_descriptions
from gemma_scope_jax.models import activations, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import attached, jumprelu

EXAMPLES = 50  # Passages that a description is made from, at most.
APART = 16  # Each block of this many positions in a row gives a latent at most one passage.
BACKGROUND = 16_384  # Positions that give the usual frequencies of tokens.
FIRINGS = 64  # Positions where a latent fires that its description is tested on, at most.
SILENT = 2_048  # Positions sampled in each half; those where a latent does not fire are its silent positions.
FEWEST = 10  # A latent with fewer passages, firings or silent positions is not scored.
CANDIDATES = 16  # Candidates for each latent to score, since most latents of an SAE may never fire.


class Events(NamedTuple):
    """Firings of candidate latents, each with a sort key: its strength, or a random number."""

    latent: np.ndarray
    position: np.ndarray
    value: np.ndarray
    key: np.ndarray

    def strongest(self, group: np.ndarray, most: int) -> "Events":
        """The events with the largest keys of each group, at most `most` for each."""
        order = np.lexsort((-self.key, group))
        group = group[order]
        is_kept = np.arange(len(order)) - np.searchsorted(group, group) < most
        return Events(*(field[order[is_kept]] for field in self))

    def joined(self, others: "Events") -> "Events":
        """These events followed by others."""
        return Events(*map(np.concatenate, zip(self, others, strict=True)))

    def where(self, is_it: np.ndarray) -> "Events":
        """The events selected by a mask."""
        return Events(*(field[is_it] for field in self))


class Firings:
    """The firings of one SAE's candidate latents, collected batch by batch in constant memory.

    For each latent: its strongest firings in the first half, a random sample of its firings in the second half, and
    whether it fires at each position of a pool, in ascending order.
    """

    def __init__(self, text: token_descriptions.Text, pool_N: np.ndarray, candidates: int, seed: int) -> None:
        empty = np.zeros(0, np.int64)
        self.text, self.pool_N = text, pool_N
        self.examples = Events(empty, empty, np.zeros(0, np.float32), np.zeros(0))
        self.tested = self.examples
        self.count_C = np.zeros(candidates, np.int64)  # Firings in both halves.
        self.is_firing_NxC = np.zeros((len(pool_N), candidates), bool)
        self._rng = np.random.default_rng(seed)

    def add(self, first_row: int, f_SxLxC: np.ndarray) -> None:
        """Adds the latents of the next rows."""
        length = f_SxLxC.shape[1]
        f_BxC = f_SxLxC.reshape(-1, f_SxLxC.shape[2])
        place, latent = np.nonzero(f_BxC)
        value, position = f_BxC[place, latent], first_row * length + place
        half = self.text.half_RxL.reshape(-1)[position]
        found = Events(latent, position, value, value)
        self.count_C += np.bincount(latent[half >= 0], minlength=self.count_C.size)

        learnt = found.where(half == 0)
        # Only the strongest firing of each block of `APART` positions.
        passage = learnt.position // length * length + learnt.position % length // APART
        learnt = learnt.strongest(learnt.latent * self.text.tokens_RxL.size + passage, 1)
        joined = self.examples.joined(learnt)
        self.examples = joined.strongest(joined.latent, EXAMPLES)

        tested = found.where(half == 1)
        tested = tested._replace(key=self._rng.random(len(tested.key)))
        joined = self.tested.joined(tested)
        self.tested = joined.strongest(joined.latent, FIRINGS)

        place = np.searchsorted(self.pool_N, position).clip(max=len(self.pool_N) - 1)
        is_one = self.pool_N[place] == position
        self.is_firing_NxC[place[is_one], latent[is_one]] = True


@dataclasses.dataclass(frozen=True)
class Latent:
    """The detection scores of one latent."""

    latent: int
    frequency: float  # share of all counted positions on which it fires
    auroc: float
    auroc_strongest: float  # AUROC of the strongest quarter of its tested firings
    control: float  # AUROC with another latent's description
    words: Mapping[str, list[str]]  # typical tokens; see `token_descriptions.words`


@dataclasses.dataclass(frozen=True)
class Detection:
    """The mean detection scores of an SAE's latents; `_se` is a standard error over latents."""

    auroc: float
    auroc_se: float
    auroc_strongest: float
    auroc_strongest_se: float
    control: float
    control_se: float
    scorable: float  # share of the candidates with enough firings and enough silent positions
    latents: tuple[Latent, ...]


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN if there are too few values."""
    n = len(values)
    if not n:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def summarize(
    found: Firings,
    candidates_C: np.ndarray,
    wanted: int,
    elsewhere: token_descriptions.Counts,
    decode: Callable[[list[int]], str],
) -> Detection:
    """Scores the first candidates that have enough firings and silent positions.

    Args:
      found: the firings of the candidates.
      candidates_C: the latents that are candidates, in random order.
      wanted: the number of latents to score, at most.
      elsewhere: the token counts of random passages of the first half.
      decode: converts token ids to text.
    """
    text, size = found.text, len(candidates_C)
    pool_NxW = token_descriptions.passages(text, found.pool_N)
    is_silent = [
        (text.half_RxL.reshape(-1)[found.pool_N] == half)[:, None] & ~found.is_firing_NxC for half in (0, 1)
    ]
    counts = [np.bincount(events.latent, minlength=size) for events in (found.examples, found.tested)]
    is_scorable_C = np.min([*counts, *(is_it.sum(0) for is_it in is_silent)], axis=0) >= FEWEST
    chosen = np.flatnonzero(is_scorable_C)[:wanted]

    def description_of(c: int) -> token_descriptions.Description:
        examples = found.examples.position[found.examples.latent == c]
        silent_KxW = pool_NxW[is_silent[0][:, c]]
        return token_descriptions.describe(token_descriptions.passages(text, examples), elsewhere, silent_KxW)

    described = [description_of(c) for c in chosen]
    latents = []
    for place, c in enumerate(chosen):
        tested = found.tested.where(found.tested.latent == c)
        firing = token_descriptions.passages(text, tested.position[np.argsort(-tested.value, kind="stable")])
        silent = pool_NxW[is_silent[1][:, c]]
        other = described[(place + 1) % len(chosen)]
        latents.append(
            Latent(
                int(candidates_C[c]),
                float(found.count_C[c] / (text.half_RxL >= 0).sum()),
                token_descriptions.score(described[place], firing, silent),
                token_descriptions.score(described[place], firing[: -(-len(firing) // 4)], silent),
                token_descriptions.score(other, firing, silent) if len(chosen) > 1 else float("nan"),
                token_descriptions.words(described[place], text, decode),
            )
        )
    means = {
        name: _mean([getattr(latent, name) for latent in latents])
        for name in ("auroc", "auroc_strongest", "control")
    }
    return Detection(
        **{name: value for name, (value, _) in means.items()},
        **{f"{name}_se": error for name, (_, error) in means.items()},
        scorable=float(is_scorable_C.mean()),
        latents=tuple(latents),
    )


@functools.partial(jax.jit, static_argnames=("mesh", "prefix"))
def _latents(
    mesh: jax.sharding.Mesh,
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    candidates_C: jax.Array,
    prefix: int,
) -> jax.Array:
    """The candidate latents [S, L, C], 0 at positions that do not count."""
    x_BxD = x_SxLxD.astype(jnp.float32).reshape(-1, x_SxLxD.shape[-1])
    f_BxM = jumprelu.encode(subject, x_BxD)
    f_SxLxC = f_BxM[:, candidates_C].reshape(*tokens_SxL.shape, -1)
    kept = jnp.where(masking.is_kept(tokens_SxL, prefix)[..., None], f_SxLxC, 0)
    return sharding.constrain(mesh, kept, sharding.REPLICATED)


def detect(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    rows: token_rows.Batch,
    latents: int,
    seed: int,
    per_batch: int,
    decode: Callable[[list[int]], str],
    prefix: int = 0,
) -> dict[str, Detection]:
    """The detection scores of SAEs' latents, all in one pass over the rows.

    Args:
      gemma: the model.
      subjects: the SAEs by name.
      rows: the rows that descriptions are made from and tested on.
      latents: the number of latents to score for each SAE; fewer are scored if few fire often enough.
      seed: seeds the samples of latents and positions.
      per_batch: rows in one pass of the model.
      decode: converts token ids to text, for the descriptions.
      prefix: the length of the user prefix, which does not count; see `masking.is_kept`.

    Raises:
      ValueError: if all rows are of one document.
    """
    text = token_descriptions.divide(rows.tokens, rows.first_document, prefix)
    rng = np.random.default_rng(seed)
    halves = [np.flatnonzero(text.half_RxL.reshape(-1) == half) for half in (0, 1)]
    background_N = rng.permutation(halves[0])[:BACKGROUND]
    pool_N = np.sort(np.concatenate([rng.permutation(half)[:SILENT] for half in halves]))
    encoders, candidates, found = {}, {}, {}
    for name, subject in subjects.items():
        encoders[name] = attached.encoder(gemma.mesh, subject.sae)
        candidates[name] = rng.permutation(subject.sae.b_enc.size)[: CANDIDATES * latents]
        found[name] = Firings(text, pool_N, len(candidates[name]), seed)
    sites = tuple(dict.fromkeys(subject.site for subject in subjects.values()))
    for batch in activations.batches(gemma, sites, rows.tokens, per_batch, "Detecting"):
        for name, subject in subjects.items():
            x_SxLxD = batch.values[subject.site]
            f_SxLxC = _latents(
                gemma.mesh, encoders[name], x_SxLxD, batch.tokens_SxL, candidates[name], prefix
            )
            found[name].add(batch.first, np.asarray(f_SxLxC)[: batch.count])
    say("Scoring the descriptions …")
    elsewhere = token_descriptions.count(
        token_descriptions.passages(text, background_N), len(text.vocabulary_V)
    )
    return {name: summarize(found[name], candidates[name], latents, elsewhere, decode) for name in subjects}


def numbers(result: Detection | Latent) -> dict:
    """A result as it is written to a file; a value that is not finite becomes None."""
    found = vars(result) | (
        {"latents": [*map(numbers, result.latents)]} if isinstance(result, Detection) else {}
    )
    return {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in found.items()}


def print_tables(results: Mapping[str, Detection], rows: int, most: int = 5) -> None:
    """Prints the mean scores of every SAE and, for at most three SAEs, the best and worst described latents."""
    table = tables.Table("", title=f"Detection AUROC of latents' descriptions, {rows:,} held-out rows")
    for column in ("latents", "all firings", "strongest quarter", "another latent's description"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        pairs = ("auroc", "auroc_strongest", "control")
        shown = [f"{getattr(result, key):.3f} ± {getattr(result, f'{key}_se'):.3f}" for key in pairs]
        table.add_row(name, str(len(result.latents)), *shown)
    tables.show(table)
    for name, result in results.items() if len(results) <= 3 else ():
        title = f"Best and worst described latents of {printable(name)}"
        table = tables.Table(title=title)
        for column in ("latent", "fires on", "AUROC"):
            table.add_column(column, justify="right")
        for column in ("last token", "tokens before"):
            table.add_column(column)
        ordered = sorted(result.latents, key=lambda latent: -latent.auroc)
        for latent in ordered if len(ordered) <= 2 * most else ordered[:most] + ordered[-most:]:
            said = (" ".join(map(repr, latent.words[part])) for part in ("on", "before"))
            table.add_row(str(latent.latent), f"{latent.frequency:.2%}", f"{latent.auroc:.3f}", *said)
        tables.show(table)
