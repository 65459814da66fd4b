"""Statistics and example firings of latents, gathered on the devices in one pass over rows of text.

For each latent, the pass keeps the number of firings, the sum and a histogram of its activations, its `top`
strongest firings and a uniform `sample` of all its firings. A firing is a row, a position and the latent's
activations around it.

The top firings are peaks: no peak is within `before` + `after` positions of a stronger firing in its row. Of equal
firings the first is the peak. So no two passages of top firings overlap, and a burst in one document does not fill
the list.

The sample consists of the firings with the highest random priority. The priority depends only on (seed, row,
position), so the sample is the same for every batch size and number of devices.

Latents are split over the devices if their number is divisible by the number of devices. The state of each latent
takes 4 · (2 + BINS + (top + sample) · (3 + T)) bytes, with T = before + 1 + after, whatever the number of rows. By
default that is 8.4 kB: 0.14 GB for 16k latents, 1.1 GB for 131k, 8.8 GB for a million. While a row of L tokens is
processed, each latent of a device takes about 5 · 4 · L bytes more. Rows are processed one at a time, whatever the
batch size.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.models import activations, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import distributed, ranges, reporting, resumable, sharding
from gemma_scope_jax.saes import attached, jumprelu

# Bins of a histogram: four for each factor of two, from 2**-10 on. The first and last bins include all values beyond.
BINS, BINS_PER_OCTAVE, LOWEST_OCTAVE = 112, 4, -10
EDGES = 2.0 ** (LOWEST_OCTAVE + np.arange(BINS + 1) / BINS_PER_OCTAVE)

SAVE_EVERY = 16  # Batches between saves: the most that an interruption can lose.

# Arrays by name; the first axis of each is the latents.
State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """How much to keep of each latent."""

    top: int = 20  # strongest firings
    sample: int = 25  # firings sampled uniformly from all
    before: int = 24  # tokens of a passage before the firing
    after: int = 16  # tokens of a passage after the firing
    seed: int = 0  # seed of the sample

    def __post_init__(self) -> None:
        for name in ("top", "sample", "before"):
            ranges.check(name, getattr(self, name), ranges.FEW)
        ranges.check("after", self.after, ranges.Range(0, ranges.FEW.high))

    @property
    def span(self) -> int:
        """T, the number of tokens in a passage."""
        return self.before + 1 + self.after


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Firings:
    """K firings of each latent, highest score first; rows are -1 if the latent fired fewer than K times."""

    row_MxK: np.ndarray  # the row's index in the order of `batching.batches`
    position_MxK: np.ndarray
    window_MxKxT: np.ndarray  # activations around the firing; 0 at positions that are not counted


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The statistics and firings of one SAE's latents."""

    options: Options
    rows: int
    activations: int  # positions that were counted
    count_M: np.ndarray  # number of firings
    mean_M: np.ndarray  # mean activation where the latent fires; 0 if it never fires
    histogram_MxH: np.ndarray  # number of firings by activation; bins in `EDGES`
    top: Firings  # strongest first
    sample: Firings  # in random order

    @property
    def frequency_M(self) -> np.ndarray:
        """The share of counted positions on which each latent fires."""
        return self.count_M / max(self.activations, 1)

    @property
    def max_M(self) -> np.ndarray:
        """Each latent's largest activation."""
        return self.top.window_MxKxT[:, 0, self.options.before]

    @property
    def is_dead_M(self) -> np.ndarray:
        """Which latents never fired."""
        return self.count_M == 0

    @property
    def is_dense_M(self) -> np.ndarray:
        """Which latents fired on a share of more than `jumprelu.DENSE` of the positions."""
        return self.frequency_M > jumprelu.DENSE


@dataclasses.dataclass(frozen=True)
class Passage:
    """The tokens around a firing, within its row and document and without BOS."""

    row: int
    tokens: np.ndarray
    values: np.ndarray  # the latent's activation on each token
    peak: int  # index of the token of the firing


def gather(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    rows: token_rows.Rows,
    count: int,
    per_batch: int,
    counts: batching.Counts = batching.all_but_special,
    options: Options = DEFAULTS,
    parts: resumable.Parts | None = None,
    placed: Mapping[str, jumprelu.SAE] | None = None,
) -> dict[str, Gathered]:
    """Gathers statistics and firings for all latents of several SAEs in the same forward passes.

    Args:
      gemma: the whole model.
      subjects: the SAEs by name.
      rows: the rows of text.
      count: how many rows to read, at most all, in the order of `batching.batches`.
      per_batch: rows in one forward pass.
      counts: which positions are counted.
      options: how much to keep of each latent.
      parts: where the state is saved after every `SAVE_EVERY` batches and restored from; None: it is not saved.
      placed: the same SAEs if they are already on the devices; None: this function places them.

    Returns:
      The statistics and firings, by SAE.
    """
    count = min(count, len(rows))
    sites = tuple(dict.fromkeys(subject.site for subject in subjects.values()))
    if placed is None:
        placed = {name: attached.place(gemma.mesh, subject.sae) for name, subject in subjects.items()}
    found = parts.read(0) if parts else None
    progress = found.pop("progress") if found else {"rows": 0, "activations": 0}
    done, counted = int(progress["rows"]), int(progress["activations"])
    kept = found or {name: _empty(one.sae.b_enc.size, options) for name, one in subjects.items()}
    states = {name: _place(gemma.mesh, state) for name, state in kept.items()}
    with reporting.bar("Reading", "row", count, done, compiles=1) as bar:
        batches = batching.batches(gemma.mesh, rows, count, per_batch, counts, done)
        for index, batch in enumerate(batches, 1):
            values = activations.read(gemma, batch.tokens_SxL, sites)
            places = done + np.arange(batch.tokens_SxL.shape[0], dtype=np.int32)
            for name, subject in subjects.items():
                states[name] = _add(
                    gemma.mesh, options, subject.top_k, states[name], placed[name], values[subject.site],
                    batch.is_kept_SxL, places,
                )  # fmt: skip
            counted += int(distributed.fetch(batch.is_kept_SxL).sum())
            done += batch.count
            bar.update(batch.count)
            if parts and index % SAVE_EVERY == 0 and done < count:
                progress = {"rows": np.int64(done), "activations": np.int64(counted)}
                parts.write(0, {**distributed.fetch(states), "progress": progress})
    return {name: _gathered(options, done, counted, distributed.fetch(states[name])) for name in subjects}


def _empty(width: int, options: Options) -> dict[str, np.ndarray]:
    state = {
        "count": np.zeros(width, np.int32),
        "sum": np.zeros(width, np.float32),
        # Firings at or above the lower edge of each bin; the first bin counts all firings.
        "above": np.zeros((width, BINS), np.int32),
    }
    for of, k in (("top", options.top), ("sample", options.sample)):
        state |= {
            f"{of}_score": np.full((width, k), -1, np.float32),
            f"{of}_row": np.full((width, k), -1, np.int32),
            f"{of}_position": np.zeros((width, k), np.int32),
            f"{of}_window": np.zeros((width, k, options.span), np.float32),
        }
    return state


def _place(mesh: jax.sharding.Mesh, state: Mapping[str, np.ndarray]) -> State:
    placed = jax.NamedSharding(mesh, _latents(mesh, len(state["count"])))
    return {
        name: jax.make_array_from_callback(value.shape, placed, lambda index, value=value: value[index])
        for name, value in state.items()
    }


def _latents(mesh: jax.sharding.Mesh, width: int) -> P:
    """The sharding of arrays whose first axis is the latents."""
    return P(*attached.latent_specs(mesh, width)["b_enc"])


@functools.partial(jax.jit, static_argnames=("mesh", "options", "top_k"), donate_argnames="state")
def _add(
    mesh: jax.sharding.Mesh,
    options: Options,
    top_k: int | None,
    state: State,
    subject: jumprelu.SAE,
    x_SxLxD: jax.Array,
    is_kept_SxL: jax.Array,
    place_S: jax.Array,
) -> State:
    """The state after a batch of rows."""
    spec = _latents(mesh, subject.b_enc.size)
    # Every device gets all rows and has its own latents, so nothing else is exchanged between devices.
    x_SxLxD, is_kept_SxL = sharding.constrain(mesh, (x_SxLxD, is_kept_SxL), P())
    add_row = jax.shard_map(
        functools.partial(_add_row, options), mesh=mesh, in_specs=(spec, spec, P(), P()), out_specs=spec
    )

    def of_row(state: State, row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[State, None]:
        x_LxD, is_kept_L, place = row
        f_LxM = jumprelu.encode(subject, x_LxD.astype(jnp.float32))
        if top_k is not None:
            f_LxM = jumprelu.keep_top(f_LxM, top_k)
        f_MxL = sharding.constrain(mesh, jnp.where(is_kept_L[:, None], f_LxM, 0).T, spec)
        key = jax.random.fold_in(jax.random.key(options.seed), place)
        return add_row(state, f_MxL, jax.random.uniform(key, is_kept_L.shape), place), None

    return jax.lax.scan(of_row, state, (x_SxLxD, is_kept_SxL, place_S))[0]


def _add_row(
    options: Options, state: State, f_MxL: jax.Array, priority_L: jax.Array, place: jax.Array
) -> State:
    """The state after one row."""
    fires_MxL = f_MxL > 0
    above = jax.lax.map(lambda edge: (f_MxL >= edge).sum(1, dtype=jnp.int32), jnp.float32(EDGES[1:-1]))
    count_M = fires_MxL.sum(1, dtype=jnp.int32)
    peak_MxL = fires_MxL & _is_peak(f_MxL, options.span - 1)
    scores = {
        "top": jnp.where(peak_MxL, f_MxL, -1),
        "sample": jnp.where(fires_MxL, priority_L[None], -1),
    }
    made = {
        "count": state["count"] + count_M,
        "sum": state["sum"] + f_MxL.sum(1),
        "above": state["above"] + jnp.concatenate([count_M[None], above]).T,
    }
    for of, score_MxL in scores.items():
        made |= _keep_best(options, of, state, score_MxL, f_MxL, place)
    return made


def _keep_best(
    options: Options, of: str, state: State, score_MxL: jax.Array, f_MxL: jax.Array, place: jax.Array
) -> State:
    """The firings with the highest scores among those kept and those of a row; ties go to the first in the text."""
    score_MxK = state[f"{of}_score"]
    k = score_MxK.shape[1]
    best_MxK, index_MxK = jax.lax.top_k(jnp.concatenate([score_MxK, score_MxL], axis=1), k)
    is_new_MxK = index_MxK >= k
    old_MxK, position_MxK = jnp.minimum(index_MxK, k - 1), jnp.maximum(index_MxK - k, 0)
    padded = jnp.pad(f_MxL, ((0, 0), (options.before, options.after)))
    around = position_MxK[..., None] + jnp.arange(options.span)[None, None]
    window = jnp.take_along_axis(padded, around.reshape(len(around), -1), axis=1).reshape(around.shape)

    def of_old(name: str) -> jax.Array:
        value = state[f"{of}_{name}"]
        return jnp.take_along_axis(value, old_MxK.reshape(old_MxK.shape + (1,) * (value.ndim - 2)), axis=1)

    return {
        f"{of}_score": best_MxK,
        f"{of}_row": jnp.where(is_new_MxK, place, of_old("row")),
        f"{of}_position": jnp.where(is_new_MxK, position_MxK, of_old("position")),
        f"{of}_window": jnp.where(is_new_MxK[..., None], window, of_old("window")),
    }


def _is_peak(f_MxL: jax.Array, radius: int) -> jax.Array:
    """Positions whose value is above all within a radius before them and not below any within a radius after."""
    length = f_MxL.shape[1]

    def ahead(value: jax.Array, by: int) -> jax.Array:
        return jnp.pad(value[:, by:], ((0, 0), (0, min(by, value.shape[1]))))

    # `largest` is the maximum of the `span` positions from each one on.
    largest, span = jnp.pad(f_MxL, ((0, 0), (radius, 0))), 1
    while 2 * span <= radius:
        largest, span = jnp.maximum(largest, ahead(largest, span)), 2 * span
    largest = jnp.maximum(largest, ahead(largest, radius - span))
    return (f_MxL > largest[:, :length]) & (f_MxL >= ahead(largest, radius + 1)[:, :length])


def _gathered(options: Options, rows: int, activations: int, state: Mapping[str, np.ndarray]) -> Gathered:
    count_M = np.asarray(state["count"], np.int64)

    def firings(of: str) -> Firings:
        return Firings(*(np.asarray(state[f"{of}_{name}"]) for name in ("row", "position", "window")))

    above = np.pad(state["above"], ((0, 0), (0, 1)))
    return Gathered(
        options, rows, activations, count_M, state["sum"] / np.maximum(count_M, 1), above[:, :-1] - above[:, 1:],
        firings("top"), firings("sample"),
    )  # fmt: skip


def bands(gathered: Gathered, latent: int, count: int = 5) -> list[np.ndarray]:
    """The sampled firings of a latent in `count` bands of activation of equal size, the strongest band first.

    Firings within a band are in random order: each is first with equal probability.
    """
    drawn = np.flatnonzero(gathered.sample.row_MxK[latent] >= 0)
    value = gathered.sample.window_MxKxT[latent, drawn, gathered.options.before]
    by_value = drawn[np.argsort(-value, kind="stable")]
    return [np.sort(band) for band in np.array_split(by_value, count) if band.size]


class Passages:
    """Cuts the passages around firings out of the rows."""

    def __init__(self, tokens_SxL: np.ndarray) -> None:
        length = tokens_SxL.shape[1]
        place = np.arange(length)[None]
        starts = np.where(tokens_SxL == masking.BOS, place + 1, 0)
        ends = np.where((tokens_SxL == masking.BOS) | (tokens_SxL == masking.PAD), place, length)
        self._tokens_SxL = tokens_SxL
        self._start_SxL = np.maximum.accumulate(starts, axis=1)
        self._end_SxL = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]

    def token(self, row: int, position: int) -> int:
        """The token at a row and position."""
        return int(self._tokens_SxL[row, position])

    def __call__(self, options: Options, firings: Firings, latent: int, index: int) -> Passage:
        """The passage around one firing of a latent."""
        row, position = int(firings.row_MxK[latent, index]), int(firings.position_MxK[latent, index])
        first = position - options.before
        start = max(first, int(self._start_SxL[row, position]))
        end = min(position + options.after + 1, int(self._end_SxL[row, position]))
        values = firings.window_MxKxT[latent, index, start - first : end - first]
        return Passage(row, self._tokens_SxL[row, start:end], values, position - start)


def read_tokens(rows: token_rows.Rows, count: int) -> np.ndarray:
    """The tokens [S, L] of the rows that `gather` reads, in the same order."""
    count = min(count, len(rows))
    return np.asarray(rows.read(token_rows.order(len(rows), batching.ORDER_SEED, 0, count)).tokens)
