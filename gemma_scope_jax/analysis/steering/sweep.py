"""Effect against damage: what a latent does to chosen predictions and to all, strength by strength.

Shapes: N strengths, S rows, L tokens, T chosen tokens.
"""

import dataclasses
import functools
import textwrap
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
from gemma_scope_jax.display import tables
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.evaluation import metrics, page
from gemma_scope_jax.models import interventions, masking, passes
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import distributed, ranges, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import plottable, printable

STRENGTHS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
# What a latent becomes by a strength: its scale, and so many times the strength is added.
KINDS = {"add": 1.0, "clamp": 0.0}
ROWS = 16  # Of held-out text that predictions are measured on, unless more or fewer are asked for.
_RAISED = 10  # Tokens whose log-probability is looked at where none are given.


@dataclasses.dataclass(frozen=True)
class Sweep(Result):
    """What a latent does to predictions, strength by strength. `_se` is a standard error over rows."""

    sae: str
    latent: int
    kind: str  # of `KINDS`
    unit: float  # the activation that a strength of 1 is
    tokens: tuple[str, ...]  # whose log-probabilities are looked at
    strengths_N: np.ndarray
    effect_N: np.ndarray  # mean change of their log-probability, in nats
    effect_se_N: np.ndarray
    damage_N: np.ndarray  # mean change of the loss of the next token, in nats
    damage_se_N: np.ndarray
    clean_loss: float
    rows: int
    predictions: int  # that both are means over

    @property
    def title(self) -> str:
        """What is done to which latent."""
        done = "added to" if self.kind == "add" else "in the place of the activation of"
        return f"so many times {self.unit:.4g} {done} latent {self.latent} of {printable(self.sae, 100)}"

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each strength."""
        names = ("effect", "effect_se", "damage", "damage_se")
        return records_of(
            {"strength": self.strengths_N} | {name: getattr(self, f"{name}_N") for name in names}
        )

    def show(self) -> None:
        """Prints a row for each strength."""
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
        said = f"Effect: on the log-probability of {' '.join(map(repr, self.tokens))}, their mean. "
        said += f"Damage: to the loss of next tokens, which is {self.clean_loss:.3f}. "
        said += f"Over {self.predictions:,} predictions of {self.rows} rows."
        tables.show(said)

    def figure(self) -> matplotlib.figure.Figure:
        """Effect against damage, a point for each strength."""
        figure = matplotlib.figure.Figure(figsize=(6.5, 4.6), layout="constrained")
        axis = figure.subplots()
        errors = (np.nan_to_num(self.effect_se_N), np.nan_to_num(self.damage_se_N))
        axis.errorbar(self.damage_N, self.effect_N, *errors, marker="o", capsize=3, lw=1, color="#1a73e8")
        for strength, damage, effect in zip(self.strengths_N, self.damage_N, self.effect_N, strict=True):
            axis.annotate(f"{strength:g}", (damage, effect), (6, -11), textcoords="offset points", fontsize=9)
        axis.axhline(0, color="#9aa0a6", lw=0.8)
        axis.axvline(0, color="#9aa0a6", lw=0.8)
        axis.set_xlabel("damage: change of the loss of next tokens, nats")
        axis.set_ylabel("effect: change of the mean log-\nprobability of the tokens, nats")
        # Not `wrap=True`, which would take a dollar sign for the beginning of mathematics.
        lines = (self.title, " ".join(map(repr, self.tokens)))
        lines = (part for line in lines for part in textwrap.wrap(printable(line, 500), 90))
        axis.set_title("\n".join(plottable(line, 100) for line in lines), fontsize=8)
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
    """Measures effect against damage of a latent changed at every position of held-out rows that counts.

    Effect is on the log-probability of chosen tokens, damage to the loss of next tokens, both of all predictions that
    an evaluation scores.

    Args:
      scope: the model and the SAEs.
      name: of the SAE.
      latent: of it.
      strengths: so many times the unit is added to the activation, or takes its place.
      kind: `add` or `clamp`, which tells the two apart.
      rows: of held-out text, at most all.
      tokens: texts of one token each; None: the ten that the decoder direction raises most, see
        `decoder_directions.logits`.
      unit: an activation; None: the latent's typical one, whatever `rows` is.

    Raises:
      ValueError: there is no such SAE, latent or kind, the latent never fired, a text is not one token, or none is
        given where the decoder does not write to the residual stream.
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
    """The ids [T] of the tokens given, or of those that a latent raises most."""
    subject = scope.subjects[name]
    if tokens:
        return np.array([one_token(scope, text) for text in tokens], np.int32)
    direction_1xO = np.asarray(subject.sae.W_dec[latent : latent + 1])
    in_stream = decoder_directions.in_stream(scope.gemma.params, subject.spliced, direction_1xO)
    if in_stream is None:
        raise InputError(
            f"{name} gives {subject.spliced}, which is not added to the residual stream, so its latents raise no "
            "tokens by themselves; give the tokens to look at"
        )
    return decoder_directions.logits(scope.gemma, in_stream, _RAISED).highest_token_MxT[0]


def _measure(
    scope: Scope, name: str, changes: Sequence[Edit], chosen_T: np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """Sums over each row's scored predictions, and by edit what becomes of them."""
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
    with reporting.bar("Sweeping", "row", total, speaks=speaks) as progress:
        for batch in batches:
            streams, values, _ = passes.clean(scope.gemma, batch.tokens_SxL, sites)
            scores = functools.partial(_scores, scope.gemma, batch, streams[site.layer], site, chosen_T)
            # From the site on, as the changed ones: an edit that changes nothing is exactly that.
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
    """See `passes.likelihoods`; with y in the site's place, where positions count."""
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
    """What edits make of a site's activations [S, L, O]."""
    all_SxL = jnp.full(tokens_SxL.shape, True)
    where = interventions.Where(tokens_SxL, masking.packed_positions(tokens_SxL), all_SxL, values)
    return sharding.constrain(mesh, write[site](values[site], where), sharding.TOKENS)
