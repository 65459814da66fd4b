"""Checks attributions by ablation: the change of the logit difference as latents are ablated one by one.

Shapes: N ablated latents, S rows, L tokens, K edited latents of one SAE.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import matplotlib.figure
import numpy as np
from scipy import stats

from gemma_scope_jax.analysis import session as scope_lib
from gemma_scope_jax.analysis.attribution import gradients as attribution_lib
from gemma_scope_jax.analysis.attribution.gradients import Attribution, Metric
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.analysis.steering import edits
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import passes
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime import distributed, ranges, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted

# Rows of one forward pass; in the first pass, row 0 has no ablation.
_ROWS = 16

_KINDS = {"all": "all", "strongest": "strongest attributions", "random": "random other latents"}


class Correlation(NamedTuple):
    """Correlation of the attributions with the effects of ablation."""

    latents: int
    pearson: float
    spearman: float


@dataclasses.dataclass(frozen=True)
class Ablations(Result):
    """Ablated latents of one or several prompts.

    Each latent is set to 0 on all tokens; the reconstruction error of its SAE is kept.
    """

    sae: tuple[str, ...]
    latent_N: np.ndarray
    layer_N: np.ndarray
    prompt_N: np.ndarray
    is_strongest_N: np.ndarray  # False: sampled from the other latents that fire.
    attributed_N: np.ndarray  # Attribution summed over all tokens, in logits.
    effect_N: np.ndarray  # Logit difference with the latent minus without.

    def correlation(
        self,
        of: Literal["all", "strongest", "random"] = "all",
        prompt: int | None = None,
        layer: int | None = None,
    ) -> Correlation:
        """Pearson and Spearman correlation of attributions and effects, of all latents or a subset.

        Both are NaN for fewer than three latents, or if all attributions or all effects are equal.
        """
        chosen_N = np.full(len(self.sae), True)
        if of != "all":
            chosen_N &= self.is_strongest_N == (of == "strongest")
        if prompt is not None:
            chosen_N &= self.prompt_N == prompt
        if layer is not None:
            chosen_N &= self.layer_N == layer
        x, y = self.attributed_N[chosen_N], self.effect_N[chosen_N]
        if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return Correlation(len(x), np.nan, np.nan)
        pearson, spearman = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
        return Correlation(len(x), float(pearson), float(spearman))

    def records(self) -> Iterator[dict[str, object]]:
        """One row per ablated latent."""
        names = ("latent", "layer", "prompt", "is_strongest", "attributed", "effect")
        return records_of({"sae": list(self.sae)} | {name: getattr(self, f"{name}_N") for name in names})

    def show(self, top: int = 10) -> None:
        """Prints the correlations, and the latents with the largest effects."""
        prompts = np.unique(self.prompt_N)
        table = tables.Table(title="correlation of attributions with effects of ablation")
        for number, heading in enumerate(("latents", "number", "Pearson", "Spearman")):
            table.add_column(heading, justify="right" if number else "left")
        found_of = {label: self.correlation(of) for of, label in _KINDS.items()}
        layers = np.unique(self.layer_N)
        if len(layers) > 1:
            found_of |= {f"layer {layer}": self.correlation(layer=layer) for layer in layers}
        for label, found in found_of.items():
            table.add_row(label, f"{found.latents}", f"{found.pearson:.3f}", f"{found.spearman:.3f}")
        if len(prompts) > 1:
            apart = np.array([self.correlation("all", prompt)[1:] for prompt in prompts])
            known = apart[np.isfinite(apart).all(1)]  # Excludes prompts with too few latents.
            if len(known):
                ends = [
                    f"{least:.3f} to {most:.3f}"
                    for least, most in zip(known.min(0), known.max(0), strict=True)
                ]
                table.add_row(f"range over {len(known)} prompts", "", *ends)
        tables.show(table)
        table = tables.Table(title=f"{top} largest effects, in logits")
        # With a single SAE or prompt, its column would be constant.
        several = {"SAE": len(set(self.sae)) > 1, "prompt": len(prompts) > 1}
        columns = [
            one for one in ("SAE", "latent", "prompt", "attribution", "effect") if several.get(one, True)
        ]
        for heading in columns:
            table.add_column(heading, justify="left" if heading == "SAE" else "right")
        for n in np.argsort(-np.abs(self.effect_N), kind="stable")[:top]:
            cells = {
                "SAE": self.sae[n],
                "latent": f"{self.latent_N[n]}",
                "prompt": f"{self.prompt_N[n]}",
                "attribution": f"{self.attributed_N[n]:+.4f}",
                "effect": f"{self.effect_N[n]:+.4f}",
            }
            table.add_row(*(cells[column] for column in columns))
        tables.show(table)

    def figure(self) -> matplotlib.figure.Figure:
        """A scatter plot with one point per latent: effect of ablation against attribution."""
        figure = plotting.Figure(5.2, 4.4)
        axis = figure.subplots()
        values = np.concatenate([self.attributed_N, self.effect_N])
        ends = (values.min(), values.max())
        axis.plot(ends, ends, color="#80868b", lw=0.8, label="equal")
        for of, colour in (("strongest", "#1a73e8"), ("random", "#e8710a")):
            chosen_N = self.is_strongest_N == (of == "strongest")
            x, y = self.attributed_N[chosen_N], self.effect_N[chosen_N]
            label = f"{_KINDS[of]}: Pearson {self.correlation(of).pearson:.2f}"
            axis.scatter(x, y, 14, color=colour, alpha=0.7, label=label)
        axis.set_xlabel("attribution, summed over tokens, logits")
        axis.set_ylabel("effect: logit difference with minus without, logits")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        return figure


def ablations(scope: Scope, attribution: Attribution, latents: int = 64, seed: int = 0) -> Ablations:
    """Ablates latents one by one: half have the strongest attributions, half are sampled from the others that fire.

    Args:
      scope: the model and SAEs.
      attribution: the attribution of a prompt, computed with this scope.
      latents: the largest number of ablated latents, over all SAEs.
      seed: the seed for sampling.

    Raises:
      ValueError: if `latents` is below 1, or no latent fires.
    """
    ranges.check("latents", latents, ranges.COUNT)
    ranges.check("seed", seed, ranges.SEED)
    chosen, is_strongest_N = _choose(attribution, latents, seed)
    if not chosen:
        raise InputError(
            f"no latent fires on {quoted(''.join(attribution.tokens))}, so there is nothing to ablate"
        )
    names = tuple(name for name, _ in chosen)
    latent_N = np.array([latent for _, latent in chosen], int)
    metric_N = _without(scope, attribution, names, latent_N)
    attributed = {name: parts.latents_M for name, parts in attribution.parts.items()}
    return Ablations(
        names,
        latent_N,
        np.array([scope.subjects[name].spliced.layer for name in names], int),
        np.zeros(len(chosen), int),
        is_strongest_N,
        np.array([attributed[name][latent] for name, latent in chosen]),
        metric_N[0] - metric_N[1:],
    )


def ablations_of_prompts(
    scope: Scope, prompts: Sequence[str], latents: int = 32, seed: int = 0, **options: str | int | None
) -> Ablations:
    """`ablations` of several prompts, with up to `latents` ablated for each.

    Args:
      scope: the model and SAEs.
      prompts: the texts.
      latents: the largest number of ablated latents per prompt.
      seed: the seed for sampling.
      **options: further arguments of `attribute`.

    Raises:
      ValueError: if there are no prompts, or as `ablations` and `attribute` raise it.
    """
    if not prompts:
        raise InputError("there are no prompts; give at least one")
    made = []
    for number, prompt in enumerate(prompts):
        reporting.say(f"Prompt {number + 1} of {len(prompts)}:")
        attribution = attribution_lib.attribute(scope, prompt, **options)
        made.append(ablations(scope, attribution, latents, seed + number))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(of, name) for of in made])

    return Ablations(
        tuple(name for of in made for name in of.sae),
        joined("latent_N"),
        joined("layer_N"),
        np.repeat(np.arange(len(made)), [len(of.sae) for of in made]),
        *(joined(name) for name in ("is_strongest_N", "attributed_N", "effect_N")),
    )


def _choose(attribution: Attribution, latents: int, seed: int) -> tuple[list[tuple[str, int]], np.ndarray]:
    """The (SAE, latent) pairs to ablate, and whether each is one of the strongest."""
    fire = [
        (abs(sums_M[latent]), name, int(latent))
        for name, parts in attribution.parts.items()
        for sums_M in (parts.latents_M,)
        for latent in np.unique(parts.latent_N)
    ]
    fire.sort(key=lambda found: -found[0])
    half = -(-latents // 2)
    strongest, others = fire[:half], fire[half:]
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(others), min(latents - len(strongest), len(others)), replace=False)
    chosen = [*strongest, *(others[n] for n in np.sort(drawn))]
    return [(name, latent) for _, name, latent in chosen], np.arange(len(chosen)) < len(strongest)


@jax.jit
def _measured(
    gemma: Gemma,
    final_SxLxD: jax.Array,
    metric: Metric,
) -> jax.Array:
    found = attribution_lib.read_metric(gemma, final_SxLxD, metric)[0]
    return sharding.constrain(gemma.mesh, found, sharding.REPLICATED)


def _without(
    scope: Scope, attribution: Attribution, names: Sequence[str], latent_N: np.ndarray
) -> np.ndarray:
    """The logit difference without ablation and with each latent ablated, [1 + N]."""
    placed = scope_lib.place_copies(scope, attribution.ids, _ROWS)
    rows = len(placed)
    against = attribution_lib.MEAN if attribution.against is None else attribution.against[0]
    metric = attribution_lib.metric_after(attribution.ids, attribution.answer[0], against)
    # Row 0 ablates nothing. Every pass has edits for all SAEs, so that all passes share one compiled program.
    names, latent_N = (None, *names), np.append(0, latent_N)
    found = []
    bar = reporting.bar("Ablating", "latent", len(latent_N) - 1, compiles=1)
    for start in range(0, len(names), rows):
        latent_K, of_K = np.zeros(rows, int), np.full(rows, None)
        here = slice(start, start + rows)
        latent_K[: len(latent_N[here])], of_K[: len(latent_N[here])] = latent_N[here], names[here]
        made = {}
        for name in attribution.parts:
            is_of_K = of_K == name
            made[name] = edits.stack_edits(
                scope.subjects[name].sae,
                np.where(is_of_K, latent_K, 0),
                1.0 - np.diag(is_of_K),
                np.zeros((rows, rows)),
            )
        write = edits.writes_of_saes(scope, made)
        final_SxLxD, _ = passes.written(scope.gemma, placed, write)
        found.append(distributed.fetch(_measured(scope.gemma, final_SxLxD, metric)))
        bar.update(min(start + rows, len(names)) - max(start, 1))
    bar.close()
    return np.concatenate(found)[: len(names)]
