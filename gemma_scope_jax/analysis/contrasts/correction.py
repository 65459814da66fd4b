"""Corrects a behaviour that differs between two sets of prompts, by ablating the latents that separate the sets.

As a control, random sets of the same number of latents with similar strength are ablated. Latents are chosen on other
prompts than those that the behaviour is measured on.

Shapes: A prompts of the first set and B of the second, N in total, S rows in one pass, L tokens, K latents of an SAE.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from gemma_scope_jax.analysis import session as scope_lib
from gemma_scope_jax.analysis.contrasts.find import Contrast, counted, last_token, rows_of
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.analysis.steering import edits
from gemma_scope_jax.data import batching
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result
from gemma_scope_jax.evaluation import metrics
from gemma_scope_jax.models import masking, passes, predictions
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import distributed, files, ranges, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError

NEAREST = 10  # A random latent is sampled from this many latents nearest in strength to a found one.
DAMAGE_SETS = 5  # How many random sets have their delta loss measured.

Write = Mapping[Site, jax.tree_util.Partial]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The behaviour of the model with a set of latents ablated; the set can be empty."""

    first_A: np.ndarray  # the logit difference after each prompt; see `behaviour`
    second_B: np.ndarray
    activation: float  # mean activation over tokens and prompts, summed over the ablated latents
    delta_loss: float | None = None  # on held-out text, in nats; None: not measured
    delta_loss_se: float | None = None

    @property
    def gap(self) -> float:
        """The mean over the first set minus the mean over the second."""
        return float(self.first_A.mean() - self.second_B.mean())


@dataclasses.dataclass(frozen=True)
class Correction(Result):
    """The effect on a behaviour of ablating the latents that separate two sets of prompts."""

    answer: str
    against: str
    is_paired: bool
    latents: tuple[tuple[str, int], ...]  # the ablated latents, as (SAE, latent)
    clean: Outcome
    ablated: Outcome
    random: tuple[Outcome, ...]  # with random sets of the same number of latents of the same SAEs

    @property
    def change(self) -> float:
        """The change of the gap by the ablation."""
        return self.ablated.gap - self.clean.gap

    @property
    def gap_se(self) -> float:
        """The standard error of the gap without ablation, over prompts."""
        return self._se(self.clean.first_A, self.clean.second_B)

    @property
    def change_se(self) -> float:
        """The standard error of the change of the gap, from the change at each prompt."""
        return self._se(
            self.ablated.first_A - self.clean.first_A, self.ablated.second_B - self.clean.second_B
        )

    def _se(self, first_A: np.ndarray, second_B: np.ndarray) -> float:
        parts = [first_A - second_B] if self.is_paired else [first_A, second_B]
        if min(map(len, parts)) < 2:
            return float("nan")
        return float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))

    def narrowed(self, outcome: Outcome) -> float:
        """How much smaller the absolute gap is than without ablation; negative if it is larger."""
        return abs(self.clean.gap) - abs(outcome.gap)

    @property
    def as_good(self) -> int:
        """How many random sets narrow the gap at least as much as the found latents."""
        return sum(self.narrowed(one) >= self.narrowed(self.ablated) for one in self.random)

    @property
    def strength(self) -> float:
        """The summed activation of a random set, on average, relative to that of the found latents."""
        return float(np.mean([one.activation for one in self.random])) / (self.ablated.activation or 1.0)

    def about(self) -> str:
        """A summary in three sentences."""
        share = self.ablated.gap / self.clean.gap if self.clean.gap else float("nan")
        p = (1 + self.as_good) / (1 + len(self.random))
        return (
            f"Ablating {counted(len(self.latents))} changes the gap from {self.clean.gap:.3f} to "
            f"{self.ablated.gap:.3f}, {share:.0%} of it. {self.as_good} of {len(self.random)} random sets narrow it "
            f"at least as much (p = {p:.2g}). Random sets fire {self.strength:.0%} as strongly."
        )

    def records(self) -> Iterator[dict[str, object]]:
        """One row per outcome: without ablation, with the found latents ablated, and with each random set ablated."""
        for kind, outcomes in (
            ("clean", (self.clean,)),
            ("ablated", (self.ablated,)),
            ("random", self.random),
        ):
            for one in outcomes:
                yield {
                    "kind": kind,
                    "gap": one.gap,
                    "activation": one.activation,
                    "delta_loss": one.delta_loss,
                    "delta_loss_se": one.delta_loss_se,
                }

    def show(self) -> None:
        """Prints the behaviour of both sets without ablation, with the found latents and with random sets ablated."""
        changes = [one.gap - self.clean.gap for one in self.random]
        table = tables.Table("", title=f"logit of {self.answer!r} minus that of {self.against!r}")
        columns = {
            "nothing ablated": [self.clean],
            f"{counted(len(self.latents))} found": [self.ablated],
            f"mean of {len(self.random)} random sets": self.random,
        }
        for heading in columns:
            table.add_column(heading, justify="right")
        for label, which in (("mean over the first prompts", 0), ("mean over the second prompts", 1)):
            shown = (
                np.mean([value.mean() for value in _behaviours(some)[which]]) for some in columns.values()
            )
            table.add_row(label, *(f"{value:.3f}" for value in shown))
        table.add_row(
            "gap",
            f"{self.clean.gap:.3f} ± {self.gap_se:.3f}",
            f"{self.ablated.gap:.3f}",
            f"{np.mean([one.gap for one in self.random]):.3f}",
        )
        change = f"{self.change:+.3f} ± {self.change_se:.3f}"
        table.add_row("change of the gap", "", change, f"{np.mean(changes):+.3f}")
        table.add_row("its range over the sets", "", "", f"{min(changes):+.3f} to {max(changes):+.3f}")
        activations = (np.mean([one.activation for one in some]) for some in columns.values())
        table.add_row("activation", *(f"{value:.4g}" for value in activations))
        table.add_row("delta loss, nats", *map(_shown_loss, columns.values()))
        tables.show(table)
        print(self.about(), flush=True)

    def figure(self) -> matplotlib.figure.Figure:
        """The gap without ablation, with the found latents ablated and with each random set ablated."""
        figure, ((axis,),) = plotting.new_figure(1, 1, 6, 2.2)
        gaps = [one.gap for one in self.random]
        axis.scatter(gaps, np.zeros(len(gaps)), s=24, color="#9aa0a6", alpha=0.7, label="random sets ablated")
        for y, gap, error, color, label in (
            (0, self.clean.gap, None, "#202124", "nothing ablated"),
            (1, self.ablated.gap, self.change_se, "#1a73e8", f"{counted(len(self.latents))} found, ablated"),
        ):
            axis.axvline(gap, color=color, lw=0.8, ls=":")
            # The error of the change, which varies less between prompts than the gap.
            axis.errorbar([gap], [y], xerr=error, fmt="o", color=color, capsize=3, label=label)
        axis.axvline(0, color="#dadce0", lw=0.8)
        axis.set_ylim(-0.6, 1.6)
        axis.set_yticks([])
        axis.set_xlabel(plottable(f"gap in the logit of {self.answer!r} minus that of {self.against!r}", 200))
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        return figure

    def write_json(self, path: str | pathlib.Path) -> None:
        """Writes all measurements, with one value per prompt."""

        def outcome(one: Outcome) -> dict:
            values = {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in vars(one).items()
            }
            values = {
                key.removesuffix("_A").removesuffix("_B"): _finite(value) for key, value in values.items()
            }
            return {"gap": one.gap, **values}

        about = {
            "answer": self.answer,
            "against": self.against,
            "is_paired": self.is_paired,
            "latents": self.latents,
            "gap_se": _finite(self.gap_se),
            "change": self.change,
            "change_se": _finite(self.change_se),
            "as_good": self.as_good,
            "clean": outcome(self.clean),
            "ablated": outcome(self.ablated),
            "random": [outcome(one) for one in self.random],
        }
        files.write_json(pathlib.Path(path), about)


def _finite(value: object) -> object:
    """Returns None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _behaviours(some: Sequence[Outcome]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [one.first_A for one in some], [one.second_B for one in some]


def _shown_loss(some: Sequence[Outcome]) -> str:
    """The delta loss with its standard error, or the mean over several outcomes with a measured delta loss."""
    measured = [one.delta_loss for one in some if one.delta_loss is not None]
    if not measured:
        return ""
    error = f" ± {some[0].delta_loss_se:.4f}" if len(some) == 1 else f" (of {len(measured)})"
    return f"{np.mean(measured):.4f}{error}"


def behaviour(
    scope: Scope, prompts: Sequence[str], answer: str, against: str, write: Write | None = None
) -> np.ndarray:
    """The logit of one token minus that of another after each prompt, [N].

    Args:
      scope: the model.
      prompts: the texts.
      answer: a text of one token, such as `" she"` with its space.
      against: the token whose logit is subtracted, as text.
      write: interventions on sites, as returned by `edits.writes`.

    Raises:
      ValueError: if `answer` or `against` is not one token, or a prompt is empty.
    """
    tokens = scope_lib.one_token(scope, answer), scope_lib.one_token(scope, against)
    return _behaviour(scope, rows_of(scope, prompts), tokens, write or {})


@jax.jit
def _at_end(
    gemma: Gemma,
    final_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    answer: jax.Array,
    against: jax.Array,
) -> jax.Array:
    """The logit difference [S] after the last token of each row."""
    last_Sx1x1 = last_token(tokens_SxL)[:, None, None]
    x_SxD = jnp.take_along_axis(final_SxLxD, last_Sx1x1, axis=1)[:, 0]
    logits_SxV = predictions.logits(gemma.whole(), x_SxD)
    return sharding.constrain(gemma.mesh, logits_SxV[:, answer] - logits_SxV[:, against], sharding.REPLICATED)


def _behaviour(scope: Scope, tokens_NxL: np.ndarray, tokens: tuple[int, int], write: Write) -> np.ndarray:
    size = batching.padded_rows(scope.gemma.mesh, len(tokens_NxL), scope.config.evaluation.rows_per_batch)
    parts = []
    for start in range(0, len(tokens_NxL), size):
        some = tokens_NxL[start : start + size]
        padded = np.pad(some, ((0, size - len(some)), (0, 0)), constant_values=masking.PAD)
        placed = scope_lib.place_prompts(scope, padded)
        final_SxLxD, _ = passes.written(scope.gemma, placed, write)
        found_S = _at_end(scope.gemma, final_SxLxD, placed, *map(np.int32, tokens))
        parts.append(np.asarray(distributed.fetch(found_S))[: len(some)])
    return np.concatenate(parts).astype(np.float64)


def correct(
    scope: Scope,
    found: Contrast,
    answer: str,
    against: str,
    first: Sequence[str],
    second: Sequence[str],
    top: int | None = None,
    random_sets: int = 20,
    seed: int = 0,
    rows: int = 8,
) -> Correction:
    """Ablates the latents that a contrast found, at all tokens, and measures the gap between the sets.

    The reconstruction error of the SAEs is kept; see `edits`. All sets of latents share one compiled program.

    Args:
      scope: the scope that the contrast was made with.
      found: the contrast.
      answer: the token whose logit is the behaviour, as text.
      against: the token whose logit is subtracted, as text.
      first: prompts like the first set of the contrast, but not the same ones.
      second: prompts like the second set of the contrast, but not the same ones.
      top: how many latents to ablate, strongest first; None: all found.
      random_sets: the number of random sets. A set has one latent for each ablated one, sampled from the `NEAREST`
        by mean activation times decoder norm, among latents of the same SAE that fire but were not found.
      seed: the seed for sampling.
      rows: the number of held-out rows for the delta loss, which is also measured for the first `DAMAGE_SETS` random
        sets; if there are fewer rows, all; 0: the delta loss is not measured.

    Raises:
      ValueError: if there are no latents or no prompts, a prompt was used to choose latents, too few other latents
        fire, `answer` or `against` is not one token, or the scope does not have the SAEs of the contrast.
    """
    tokens = scope_lib.one_token(scope, answer), scope_lib.one_token(scope, against)
    _check(scope, found, first, second, top, random_sets, rows)
    latents = found.found()[:top]
    chosen: dict[str, list[int]] = {}
    for name, latent in latents:
        chosen.setdefault(name, []).append(latent)
    rng = np.random.default_rng(seed)
    strengths = {name: _strength(scope, found, name) for name in chosen}
    drawn = {name: _alike(strengths[name], found, name, of, random_sets, rng) for name, of in chosen.items()}
    sets = [chosen, *({name: of[number] for name, of in drawn.items()} for number in range(random_sets))]
    tokens_NxL = rows_of(scope, [*first, *second])
    text = _held_out(scope, rows) if rows else None

    # Held-out text is not edited at a chat template's tokens, as no SAE is trained on them. Prompts have no template.
    prefix = masking.masked_prefix(scope.config.data)
    bar = reporting.bar("Ablating", "set", len(sets) + 1, compiles=1)
    clean_loss = None if text is None else _losses(scope, text, _write(scope, chosen, 1, prefix))
    clean_N = _behaviour(scope, tokens_NxL, tokens, _write(scope, chosen, 1))
    outcomes = [Outcome(clean_N[: len(first)], clean_N[len(first) :], 0.0)]
    bar.update()
    for number, some in enumerate(sets):
        write = _write(scope, some, 0)
        value_N = _behaviour(scope, tokens_NxL, tokens, write)
        delta = (None, None)
        if text is not None and number <= DAMAGE_SETS:
            loss_S, scored_S = _losses(scope, text, _write(scope, some, 0, prefix))
            delta = metrics.ratio(loss_S - clean_loss[0], scored_S)
        activation = sum(float(found.of[name].activation_M[list(of)].sum()) for name, of in some.items())
        outcomes.append(Outcome(value_N[: len(first)], value_N[len(first) :], activation, *delta))
        bar.update()
    bar.close()
    clean, ablated, *random = outcomes
    return Correction(answer, against, found.is_paired, tuple(latents), clean, ablated, tuple(random))


def _check(
    scope: Scope,
    found: Contrast,
    first: Sequence[str],
    second: Sequence[str],
    top: int | None,
    random_sets: int,
    rows: int,
) -> None:
    if top is not None:
        ranges.check("top", top, ranges.COUNT)
    ranges.check("random_sets", random_sets, ranges.COUNT)
    ranges.check("rows", rows, ranges.COUNT_OR_NONE)
    for name, latent in found.found():
        scope.check_latent(name, latent)
    if not found.found():
        raise InputError(
            f"there is no latent to ablate; the contrast found no latent at a rate of {found.rate:g}"
        )
    if not first or not second:
        raise InputError(
            f"there are {len(first)} and {len(second)} prompts to measure; give at least one of each set"
        )
    if found.is_paired and len(first) != len(second):
        raise InputError(
            f"paired sets must have the same size; these have {len(first)} and {len(second)} prompts"
        )
    # On the prompts of the contrast, the latents separate the sets by selection.
    if chosen_on := {*first, *second} & {*found.first, *found.second}:
        raise InputError(
            f"latents were chosen on the prompt {min(chosen_on)!r}; measure on other prompts, "
            "such as the other half from `halves`"
        )


def _strength(scope: Scope, found: Contrast, name: str) -> np.ndarray:
    """The mean activation of each latent times its decoder norm, [M]."""
    norm_M = np.linalg.norm(np.asarray(scope.subjects[name].sae.W_dec), axis=1).astype(np.float64)
    return found.of[name].activation_M * norm_M


def _alike(
    strength_M: np.ndarray,
    found: Contrast,
    name: str,
    latents_K: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Random sets of latents that fire but were not found, each latent about as strong as the one it replaces."""
    others = np.setdiff1d(np.flatnonzero(strength_M > 0), found.latents(name))
    if len(others) < len(latents_K):
        raise InputError(
            f"only {len(others)} other latents of {name} fire on these prompts, too few for random sets of "
            f"{counted(len(latents_K))}; set top to {len(others)} or less"
        )
    sets = []
    for _ in range(count):
        left = others
        drawn = dict.fromkeys(latents_K)
        for latent in rng.permutation(latents_K).tolist():
            distance = np.abs(np.log(strength_M[left] / strength_M[latent]))
            place = rng.choice(np.argsort(distance, kind="stable")[:NEAREST])
            drawn[latent] = int(left[place])
            left = np.delete(left, place)
        sets.append(list(drawn.values()))
    return sets


def _write(scope: Scope, latents: Mapping[str, Sequence[int]], scale: float, first: int = 0) -> Write:
    """Interventions that scale latents from token `first` on; scale 0 ablates them, scale 1 keeps them."""
    made = {}
    for name, of in latents.items():
        every_1xK, tokens = np.ones((1, len(of))), [edits.from_token(first)] * len(of)
        made[name] = edits.stack_edits(scope.subjects[name].sae, of, scale * every_1xK, 0 * every_1xK, tokens)
    return edits.writes_of_saes(scope, made)


def _held_out(scope: Scope, rows: int) -> list[batching.PlacedRows]:
    split = scope.held_out()
    config, count = scope.config, min(rows, len(split))
    return list(
        batching.batches(
            scope.gemma.mesh, split, count, config.evaluation.rows_per_batch, batching.counts_of(config)
        )
    )


def _losses(scope: Scope, text: Sequence[batching.PlacedRows], write: Write) -> tuple[np.ndarray, np.ndarray]:
    """The summed loss of each row's scored predictions, and their number."""
    sums = []
    for rows in text:
        final_SxLxD, _ = passes.written(scope.gemma, rows.tokens_SxL, write)
        found = distributed.fetch(passes.loss(scope.gemma, final_SxLxD, rows.tokens_SxL, rows.is_kept_SxL))
        sums.append([np.float64(found[key]).sum(1)[: rows.count] for key in ("loss_SxL", "scored_SxL")])
    loss_S, scored_S = (np.concatenate(part) for part in zip(*sums, strict=True))
    return loss_S, scored_S
