"""Contrasts two sets of prompts: finds the latents whose activations separate them.

The tests control the false discovery rate over all tested latents. This is a rate of latents; it does not say what a
latent means. The tests assume that prompts are independent of each other.

Shapes: N prompts, A of the first set and B of the second, S rows in one pass, L tokens, M latents.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from scipy import stats

from gemma_scope_jax.analysis.contrasts import rank_tests
from gemma_scope_jax.analysis.session import Scope, padded
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import activations, generation, masking
from gemma_scope_jax.runtime import distributed, files, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable, quoted
from gemma_scope_jax.saes import jumprelu

# The value of a latent for a prompt: its mean or largest activation over the tokens, or that at the last token.
At = Literal["mean", "max", "last"]
AT = ("mean", "max", "last")

MOST_SHUFFLES = 1_000_000


class Latents(NamedTuple):
    """Results of one SAE, each [M]. Latents that fire in no prompt are not tested; their AUROC, p and q are NaN."""

    auroc_M: np.ndarray  # above ½ if the first set has larger values
    p_M: np.ndarray
    q_M: np.ndarray  # the lowest false discovery rate, over all SAEs' latents, at which a latent is found
    first_M: np.ndarray  # mean over the set's prompts
    second_M: np.ndarray
    fires_first_M: np.ndarray  # fraction of the set's prompts
    fires_second_M: np.ndarray
    activation_M: np.ndarray  # mean over tokens and then over all prompts, whatever `at` is

    @property
    def is_tested_M(self) -> np.ndarray:
        """Whether each latent fires in any prompt."""
        return ~np.isnan(self.p_M)


@dataclasses.dataclass(frozen=True)
class Contrast(Result):
    """The latents that separate two sets of prompts."""

    model: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    at: At
    rate: float
    is_paired: bool
    smallest_p: float  # the smallest p possible with these prompts and shuffles
    of: Mapping[str, Latents]  # by SAE

    @property
    def size(self) -> str:
        """The name of the effect size: AUROC, or the fraction of pairs whose first value is larger."""
        return "pairs with larger first" if self.is_paired else "AUROC"

    @property
    def tested(self) -> int:
        """The number of latents, over all SAEs, that fire in any prompt."""
        return sum(int(one.is_tested_M.sum()) for one in self.of.values())

    @property
    def silent(self) -> int:
        """The number of latents, over all SAEs, that fire in no prompt."""
        return sum(int((~one.is_tested_M).sum()) for one in self.of.values())

    def latents(self, name: str) -> list[int]:
        """The found latents of an SAE, strongest first: by distance of AUROC from ½, then by difference of means."""
        return [latent for of, latent in self.found() if of == name]

    def found(self) -> list[tuple[str, int]]:
        """The found latents of all SAEs as (SAE, latent), in the same order as `latents`."""
        ranked = []
        for name, one in self.of.items():
            for latent in np.flatnonzero(one.q_M <= self.rate).tolist():
                difference = abs(float(one.first_M[latent] - one.second_M[latent]))
                ranked.append((-round(abs(float(one.auroc_M[latent]) - 0.5), 9), -difference, name, latent))
        return [(name, latent) for _, _, name, latent in sorted(ranked)]

    def about(self) -> str:
        """A summary: how many latents were tested and found, and what the number of prompts allows."""
        sizes = (
            f"{len(self.first)} pairs"
            if self.is_paired
            else f"{len(self.first)} and {len(self.second)} prompts"
        )
        said = (
            f"{len(self.found()):,} of {self.tested:,} latents separate the sets ({sizes}) at a false discovery rate "
            f"of {self.rate:g}; {self.silent:,} more fire in no prompt and are not tested. The smallest possible p "
            f"is {self.smallest_p:.2g}."
        )
        alone = self.rate / max(self.tested, 1)
        if self.smallest_p > alone:
            together = math.ceil(self.smallest_p / alone)
            said += f" At least {together} latents must reach it for any to be found."
            sizes = len(self.first), len(self.second), self.is_paired
            # Otherwise more shuffles are needed, not more prompts.
            if 2 / rank_tests.labelings(*sizes) > alone:
                needed = rank_tests.prompts_needed(alone, self.is_paired)
                what = "pairs" if self.is_paired else "prompts in each set"
                said += f" A latent found alone needs p ≤ {alone:.2g}, which takes {needed} {what}."
        return said

    def records(self) -> Iterator[dict[str, object]]:
        """One row per latent of each SAE. Latents that fire in no prompt have no AUROC, p or q."""
        for name, one in self.of.items():
            columns = {field.removesuffix("_M"): values for field, values in one._asdict().items()}
            latents = np.arange(len(one.p_M))
            is_found = np.isin(latents, self.latents(name))
            yield from records_of({"sae": name, "latent": latents, **columns, "is_found": is_found})

    def show(self, top: int = 10) -> None:
        """Prints the strongest found latents of each SAE."""
        for name, one in self.of.items():
            latents = self.latents(name)
            if not latents and len(self.of) > 1:
                continue
            shown = f", {top} shown" if len(latents) > top else ""
            table = tables.Table(title=f"{printable(name)}: {counted(len(latents))} found{shown}")
            sets = ("mean in first", "mean in second", "fires in first", "fires in second")
            for heading in ("latent", self.size, "q", *sets):
                table.add_column(heading, justify="right")
            for i in latents[:top]:
                table.add_row(
                    str(i), f"{one.auroc_M[i]:.3f}", f"{one.q_M[i]:.2g}", f"{one.first_M[i]:.4g}",
                    f"{one.second_M[i]:.4g}", f"{one.fires_first_M[i]:.0%}", f"{one.fires_second_M[i]:.0%}",
                )  # fmt: skip
            tables.show(table)
        print(self.about(), flush=True)

    def figure(self, label: int = 10) -> matplotlib.figure.Figure:
        """q against AUROC of every tested latent; the strongest found latents are labelled."""
        figure = plotting.Figure(7, 4.5)
        axis = figure.subplots()
        for one in self.of.values():
            is_found_M = one.is_tested_M & (one.q_M <= self.rate)
            for is_shown_M, color in ((one.is_tested_M & ~is_found_M, "#9aa0a6"), (is_found_M, "#1a73e8")):
                y = -np.log10(one.q_M[is_shown_M])
                axis.scatter(one.auroc_M[is_shown_M], y, s=12, color=color, alpha=0.5, linewidths=0)
        # Many latents have the same q and almost the same AUROC; points close together share one label.
        together: dict[tuple[float, float], list[tuple[str, int]]] = {}
        for name, latent in self.found()[:label]:
            place = self.of[name].auroc_M[latent], -np.log10(self.of[name].q_M[latent])
            near = next((at for at in together if np.hypot(at[0] - place[0], at[1] - place[1]) < 0.12), place)
            together.setdefault(near, []).append((name, latent))
        for (x, y), latents in together.items():
            names = [
                str(latent) if len(self.of) == 1 else f"{plottable(name)} {latent}"
                for name, latent in latents
            ]
            lines = "\n".join(names[:3] + [f"and {len(names) - 3} more"] * (len(names) > 3))
            style = {"textcoords": "offset points", "fontsize": 7}
            side = {"xytext": (-5, -3), "ha": "right"} if x > 0.5 else {"xytext": (5, -3), "ha": "left"}
            axis.annotate(lines, (x, y), va="top", **style, **side)
        axis.axhline(-np.log10(self.rate), color="#d93025", lw=0.8)
        axis.set_xlim(-0.08, 1.08)
        axis.margins(y=0.12)  # Room for the labels.
        axis.set_xlabel(f"{self.size} (← larger in the second set, larger in the first set →)")
        axis.set_ylabel("−log₁₀ q (q: false discovery rate)")
        axis.set_title(
            f"{len(self.found()):,} of {self.tested:,} latents found at a false discovery rate of {self.rate:g}",
            fontsize=10,
        )
        return figure

    def write_json(self, path: str | pathlib.Path) -> None:
        """Writes the settings, the counts and every found latent, strongest first."""
        saes = {}
        for name, one in self.of.items():
            fields = {field.removesuffix("_M"): values for field, values in one._asdict().items()}
            saes[name] = {
                "tested": int(one.is_tested_M.sum()),
                "silent": int((~one.is_tested_M).sum()),
                "found": [
                    {"latent": i, **{field: float(values[i]) for field, values in fields.items()}}
                    for i in self.latents(name)
                ],
            }
        names = ("model", "first", "second", "at", "rate", "is_paired", "smallest_p")
        about = {name: getattr(self, name) for name in names}
        files.write_json(
            pathlib.Path(path), about | {"tested": self.tested, "silent": self.silent, "sae": saes}
        )


def counted(latents: int) -> str:
    """The number of latents with its noun, such as '2 latents'."""
    return f"{latents:,} latent{'' if latents == 1 else 's'}"


def contrast(
    scope: Scope,
    first: Sequence[str],
    second: Sequence[str],
    at: At = "mean",
    rate: float = 0.05,
    is_paired: bool = False,
    seed: int = 0,
) -> Contrast:
    """Finds the latents that separate two sets of prompts.

    Args:
      scope: the model and SAEs; the latents of all SAEs are tested together.
      first: the first set of prompts, independent of each other.
      second: the second set; if `is_paired`, prompt i is the counterpart of prompt i of the first set.
      at: a latent's value for a prompt: "mean" or "max" over the tokens after BOS, or "last" for the last token.
      rate: the false discovery rate of the found latents, by the Benjamini-Hochberg procedure.
      is_paired: whether each prompt is compared only with its counterpart.
      seed: the seed for the random permutations.

    Raises:
      ValueError: if a prompt is empty or appears twice, paired sets differ in size, or there are too few prompts to
        find anything.
    """
    check(first, second, at, rate, is_paired)
    features, means = features_of(scope, [*first, *second], at)
    fires = {name: (f_NxM > 0).any(0) for name, f_NxM in features.items()}
    tested = sum(int(of.sum()) for of in fires.values())
    # Ten times the number that a latent found alone needs.
    shuffles = min(math.ceil(10 * tested / rate), MOST_SHUFFLES)
    reporting.say(f"Testing {counted(tested)} …")
    p, auroc = {}, {}
    for name, f_NxM in features.items():
        sets = (f_NxM[: len(first), fires[name]], f_NxM[len(first) :, fires[name]])
        p[name] = rank_tests.p_values(*sets, is_paired, rate, shuffles, seed)
        auroc[name] = rank_tests.auroc(*sets, is_paired)
    all_q = stats.false_discovery_control(np.concatenate(list(p.values()))) if tested else np.zeros(0)
    ends = np.cumsum([len(of) for of in p.values()])[:-1]
    of = {}
    for (name, f_NxM), q in zip(features.items(), np.split(all_q, ends), strict=True):
        measured = [np.full(f_NxM.shape[1], np.nan) for _ in range(3)]
        for into_M, values in zip(measured, (auroc[name], p[name], q), strict=True):
            into_M[fires[name]] = values
        sets = (f_NxM[: len(first)], f_NxM[len(first) :])
        shares = [(part > 0).mean(0) for part in sets]
        of[name] = Latents(*measured, *(part.mean(0) for part in sets), *shares, means[name].mean(0))
    smallest = rank_tests.smallest_p(len(first), len(second), is_paired, shuffles)
    return Contrast(scope.config.model, tuple(first), tuple(second), at, rate, is_paired, smallest, of)


def check(first: Sequence[str], second: Sequence[str], at: At, rate: float, is_paired: bool) -> None:
    """Raises ValueError if `contrast` would reject these arguments with any SAEs."""
    if at not in AT:
        raise InputError(f"at is {at!r}; choose one of {', '.join(AT)}")
    if not 0 < rate < 1:
        raise InputError(f"rate is {rate}; it must be between 0 and 1")
    if is_paired and len(first) != len(second):
        raise InputError(
            f"paired sets must have the same size; these have {len(first)} and {len(second)} prompts"
        )
    # A duplicate would count as independent evidence.
    for these in [list(zip(first, second, strict=True))] if is_paired else [first, second]:
        if twice := [one for number, one in enumerate(these) if one in these[:number]]:
            what = "pair" if is_paired else "prompt"
            raise InputError(f"the {what} {quoted(twice[0])} appears twice; give each {what} once")
    smallest = min(2 / rank_tests.labelings(len(first), len(second), is_paired), 1.0)
    if smallest > rate:
        needed = rank_tests.prompts_needed(rate, is_paired)
        what = f"{len(first)} pairs" if is_paired else f"{len(first)} and {len(second)} prompts"
        raise InputError(
            f"with {what} the smallest possible p is {smallest:.2g}, above the rate of {rate:g}, so no latent can be "
            f"found; give at least {needed} {'pairs' if is_paired else 'prompts in each set'}, and more if many "
            "latents are tested"
        )


@functools.partial(jax.jit, static_argnames=("mesh", "at"))
def _pooled(
    mesh: jax.sharding.Mesh, subject: jumprelu.SAE, x_SxLxD: jax.Array, tokens_SxL: jax.Array, at: At
) -> tuple[jax.Array, jax.Array]:
    """The value of each latent for each prompt, and its mean over the tokens, both [S, M]."""
    last_S = last_token(tokens_SxL)

    # Row by row, because the latents of all rows of a wide SAE do not fit in memory.
    def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_LxD, kept_L, last = row
        f_LxM = jumprelu.encode(subject, x_LxD.astype(jnp.float32))
        f_LxM = jnp.where(kept_L[:, None], f_LxM, 0)
        mean_M = f_LxM.sum(0) / jnp.maximum(kept_L.sum(), 1)  # A padding row has no tokens.
        return {"mean": mean_M, "max": f_LxM.max(0), "last": f_LxM[last]}[at], mean_M

    pooled_SxM, mean_SxM = jax.lax.map(of_row, (x_SxLxD, masking.is_kept(tokens_SxL, 0), last_S))
    return sharding.constrain(mesh, (pooled_SxM, mean_SxM), sharding.REPLICATED)


def last_token(tokens_SxL: jax.Array) -> jax.Array:
    """The position [S] of each row's last token that is not padding."""
    index_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1])[None], tokens_SxL.shape)
    return jnp.where(tokens_SxL != masking.PAD, index_SxL, 0).max(1)


def features_of(
    scope: Scope, prompts: Sequence[str], at: At
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The value of each latent for each prompt, and its mean over the tokens, [N, M] by SAE."""
    features, means = ({name: [] for name in scope.subjects} for _ in range(2))
    tokens_NxL = rows_of(scope, prompts)
    sites = tuple(dict.fromkeys(subject.site for subject in scope.subjects.values()))
    per_batch = scope.config.evaluation.rows_per_batch
    for batch in activations.batches(scope.gemma, sites, tokens_NxL, per_batch, "Reading"):
        for name, subject in scope.subjects.items():
            x_SxLxD = batch.values[subject.site]
            found = distributed.fetch(
                _pooled(scope.gemma.mesh, scope.placed[name], x_SxLxD, batch.tokens_SxL, at)
            )
            for into, value_SxM in zip((features, means), found, strict=True):
                into[name].append(value_SxM[: batch.count])
    features, means = (
        {name: np.concatenate(of) for name, of in found.items()} for found in (features, means)
    )
    return features, means


def rows_of(scope: Scope, prompts: Sequence[str]) -> np.ndarray:
    """The tokens [N, L] of prompts, each with BOS, `padded` to one length.

    With one length, the same tokens in two prompts are computed in the same way and have equal values.

    Raises:
      ValueError: if a prompt has no tokens.
    """
    rows = [generation.text_prompt(scope.tokenizer, prompt) for prompt in prompts]
    if empty := [number for number, row in enumerate(rows) if len(row) < 2]:
        raise InputError(f"prompt {empty[0]} is empty; give prompts of at least one token")
    return padded(rows)
