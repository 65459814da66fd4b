"""Effect and damage of steering a latent, by strength: on chosen tokens and on the next-token loss.

Shapes: N strengths, S rows, L tokens, T chosen tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from gemma_scope_jax.analysis import decoder_directions, latent_statistics
from gemma_scope_jax.analysis.session import Scope, one_token
from gemma_scope_jax.analysis.steering import edits
from gemma_scope_jax.analysis.steering.edits import Edit
from gemma_scope_jax.data import batching
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.evaluation import metrics, page
from gemma_scope_jax.models import interventions, masking, passes
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import distributed, ranges, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable

STRENGTHS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
# By kind of edit, the scale of the activation; strength times unit is added.
KINDS = {"add": 1.0, "clamp": 0.0}
ROWS = 16  # The default number of held-out rows.
_RAISED = 10  # The number of tokens measured if none are given.


@dataclasses.dataclass(frozen=True)
class Sweep(Result):
    """Effect and damage of steering a latent, by strength. `_se` is a standard error over rows."""

    sae: str
    latent: int
    kind: str  # a key of `KINDS`
    unit: float  # the activation at strength 1
    tokens: tuple[str, ...]  # the chosen tokens, whose log-probabilities are measured
    strengths_N: np.ndarray
    effect_N: np.ndarray  # mean change of the log-probability of the chosen tokens, in nats
    effect_se_N: np.ndarray
    damage_N: np.ndarray  # mean change of the next-token loss, in nats
    damage_se_N: np.ndarray
    clean_loss: float  # next-token loss without edits, in nats
    rows: int
    predictions: int  # the number of predictions in each mean

    @property
    def title(self) -> str:
        """The latent and its edit."""
        done = "added to its activation" if self.kind == "add" else "replaces its activation"
        return f"latent {self.latent} of {printable(self.sae, 100)}: strength × {self.unit:.4g} {done}"

    def records(self) -> Iterator[dict[str, object]]:
        """One row per strength."""
        names = ("effect", "effect_se", "damage", "damage_se")
        return records_of(
            {"strength": self.strengths_N} | {name: getattr(self, f"{name}_N") for name in names}
        )

    def show(self) -> None:
        """Prints a table with one row per strength."""
        tables.show(self.title, "bold")
        table = tables.Table()
        for heading in ("strength", "effect, nats", "damage, nats"):
            table.add_column(heading, justify="right")
        columns = (self.effect_N, self.effect_se_N, self.damage_N, self.damage_se_N)
        for strength, effect, effect_se, damage, damage_se in zip(self.strengths_N, *columns, strict=True):
            shown = (
                page.with_error(effect, effect_se, "+.3f"),
                page.with_error(damage, damage_se, "+.3f"),
            )
            table.add_row(f"{strength:g}", *shown)
        tables.show(table)
        said = f"Effect: change of the mean log-probability of {' '.join(map(repr, self.tokens))}. "
        said += f"Damage: change of the next-token loss, {self.clean_loss:.3f} nats without the edit. "
        said += f"Both are means over {self.predictions:,} predictions in {self.rows} rows."
        tables.show(said)

    def figure(self) -> matplotlib.figure.Figure:
        """Effect against damage, with one point per strength."""
        figure = plotting.Figure(6.5, 4.6)
        axis = figure.subplots()
        errors = (np.nan_to_num(self.effect_se_N), np.nan_to_num(self.damage_se_N))
        axis.errorbar(self.damage_N, self.effect_N, *errors, marker="o", capsize=3, lw=1, color="#1a73e8")
        for strength, damage, effect in zip(self.strengths_N, self.damage_N, self.effect_N, strict=True):
            axis.annotate(f"{strength:g}", (damage, effect), (6, -11), textcoords="offset points", fontsize=9)
        axis.axhline(0, color="#9aa0a6", lw=0.8)
        axis.axvline(0, color="#9aa0a6", lw=0.8)
        axis.set_xlabel("damage: change of the next-token loss, nats")
        axis.set_ylabel("effect: mean change of the\nlog-probability of the tokens, nats")
        lines = (self.title, " ".join(map(repr, self.tokens)))
        axis.set_title("\n".join(plottable(line, 500, 90) for line in lines), fontsize=8)
        axis.grid(alpha=0.3)
        axis.margins(0.1)
        return figure


def sweep(
    scope: Scope,
    name: str,
    latent: int,
    strengths: Sequence[float] = STRENGTHS,
    kind: str = "add",
    rows: int = ROWS,
    tokens: Sequence[str] | None = None,
    unit: float | None = None,
) -> Sweep:
    """Measures effect and damage of editing a latent at every scored position of held-out rows, by strength.

    The effect is the mean change of the log-probability of the chosen tokens, the damage the mean change of the
    next-token loss. Both are means over all predictions that an evaluation scores.

    Args:
      scope: the model and the SAEs.
      name: the name of the SAE.
      latent: the index of the latent.
      strengths: multiples of `unit`.
      kind: `add` adds strength times unit to the activation, `clamp` replaces the activation by it.
      rows: the number of held-out rows; if there are fewer, all.
      tokens: the chosen tokens, each a text of one token; None: the ten that the decoder direction raises most, see
        `decoder_directions.logits`.
      unit: the activation at strength 1; None: the latent's typical activation, which does not depend on `rows`.

    Raises:
      ValueError: if the SAE, latent or kind does not exist, the latent never fired, a text is not one token, or no
        tokens are given and the decoder does not write to the residual stream.
    """
    scope.check_latent(name, latent)
    if kind not in KINDS or not strengths or rows < 1:
        raise InputError(
            f"kind is {kind!r}, rows {rows}, strengths {tuple(strengths)}; give one of {', '.join(KINDS)}, and at "
            "least one row and strength"
        )
    for strength in strengths:
        ranges.check("a strength", strength, ranges.SIGNED)
    chosen_T = _chosen(scope, name, latent, tokens)
    unit = latent_statistics.typical(scope, name, latent) if unit is None else unit
    changes = [Edit(name, latent, KINDS[kind], float(strength) * unit) for strength in strengths]
    found = _measure(scope, name, changes, chosen_T, rows)
    scored_S = found["scored_S"]
    effects, damages = (
        np.array([metrics.ratio(change_S, scored_S) for change_S in found[which]])
        for which in ("effect_NxS", "damage_NxS")
    )
    return Sweep(
        name,
        latent,
        kind,
        unit,
        tuple(scope.tokenizer.decode([int(token)]) for token in chosen_T),
        np.array(strengths, np.float64),
        *effects.T,
        *damages.T,
        metrics.ratio(found["clean_S"], scored_S)[0],
        scored_S.size,
        int(scored_S.sum()),
    )


def _chosen(scope: Scope, name: str, latent: int, tokens: Sequence[str] | None) -> np.ndarray:
    """The ids [T] of the given tokens, or of the tokens that the latent raises most."""
    subject = scope.subjects[name]
    if tokens:
        return np.array([one_token(scope, text) for text in tokens], np.int32)
    direction_1xO = np.asarray(subject.sae.W_dec[latent : latent + 1])
    in_stream = decoder_directions.in_stream(scope.gemma.params, subject.spliced, direction_1xO)
    if in_stream is None:
        raise InputError(
            f"{name} reconstructs {subject.spliced}, which is not added to the residual stream, so its latents have "
            "no direct effect on logits; give the tokens to measure"
        )
    return decoder_directions.logits(scope.gemma, in_stream, _RAISED).highest_token_MxT[0]


def _measure(
    scope: Scope, name: str, changes: Sequence[Edit], chosen_T: np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """Sums over each row's scored predictions: clean loss and count, and by edit the changes."""
    subject, mesh = scope.subjects[name], scope.gemma.mesh
    site = subject.spliced
    sites = tuple(dict.fromkeys((subject.site, site)))
    writes = [edits.writes(scope, [edit]) for edit in changes]
    held_out = scope.held_out()
    rows = min(rows, len(held_out))
    per_batch = scope.config.evaluation.rows_per_batch
    parts: dict[str, list[np.ndarray]] = {"clean_S": [], "scored_S": [], "effect_NxS": [], "damage_NxS": []}
    batches = batching.batches(mesh, held_out, rows, per_batch, batching.counts_of(scope.config))
    total, speaks = rows * (1 + len(changes)), distributed.is_first()
    with reporting.bar("Sweeping", "row", total, speaks=speaks, compiles=1) as progress:
        for batch in batches:
            streams, values, _ = passes.clean(scope.gemma, batch.tokens_SxL, sites)
            scores = functools.partial(_scores, scope.gemma, batch, streams[site.layer], site, chosen_T)
            # The clean pass starts from the site, like the edited ones: an edit that changes nothing has effect 0.
            clean, changed = scores(values[site]), []
            progress.update(batch.count)
            for write in writes:
                changed.append(scores(_written(mesh, write, values, batch.tokens_SxL, site)))
                progress.update(batch.count)
            parts["clean_S"].append(clean["loss_SxL"].sum(1))
            parts["scored_S"].append(clean["scored_SxL"].sum(1))
            for part, of in (("effect_NxS", "chosen_SxL"), ("damage_NxS", "loss_SxL")):
                parts[part].append(np.stack([(one[of] - clean[of]).sum(1) for one in changed]))
    return {key: np.concatenate(values, axis=-1) for key, values in parts.items()}


def _scores(
    gemma: Gemma,
    batch: batching.PlacedRows,
    before_SxLxD: jax.Array,
    site: Site,
    chosen_T: np.ndarray,
    y_SxLxO: jax.Array,
) -> dict[str, np.ndarray]:
    """`passes.likelihoods` with y as the site's activations at the scored positions."""
    of_batch = (batch.tokens_SxL, batch.is_kept_SxL)
    final_SxLxD = passes.spliced(gemma, before_SxLxD, *of_batch, site, y_SxLxO)
    found = distributed.fetch(passes.likelihoods(gemma, final_SxLxD, *of_batch, chosen_T))
    return {name: np.asarray(value[: batch.count], np.float64) for name, value in found.items()}


@functools.partial(jax.jit, static_argnames=("mesh", "site"))
def _written(
    mesh: jax.sharding.Mesh,
    write: Mapping[Site, jax.tree_util.Partial],
    values: Mapping[Site, jax.Array],
    tokens_SxL: jax.Array,
    site: Site,
) -> jax.Array:
    """A site's activations [S, L, O] after edits."""
    all_SxL = jnp.full(tokens_SxL.shape, True)
    where = interventions.Where(tokens_SxL, masking.packed_positions(tokens_SxL), all_SxL, values)
    return sharding.constrain(mesh, write[site](values[site], where), sharding.TOKENS)
