"""Attribution of a prediction to latents: each activation times the gradient of a logit difference.

The gradient g at a site is that of the unmodified model, with no SAE spliced in. A latent's attribution at a token is
f (g · W_dec). The SAE's error, b_dec and the output of a skip connection have attributions, too. Together they sum
to y · g, where y is the site's activation.

Shapes: S rows, L tokens, N nonzero activations, D and O widths of an SAE's input and output sites, M latents, V
vocabulary.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from gemma_scope_jax.analysis import session as scope_lib
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.display import html, plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import forward, masking, predictions
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site, site_width
from gemma_scope_jax.runtime import distributed, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import ending, quoted
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import jumprelu

# Special values of a token id in `Metric`.
LIKELIEST = -1  # The likeliest token, excluding the other token of the metric.
MEAN = -2  # The mean of all logits.


class Metric(NamedTuple):
    """The logit difference: one token's logit minus another's, or minus the mean; the same for all rows."""

    last: np.int32  # The position whose next-token logits are used.
    answer: np.int32
    against: np.int32


class Parts(NamedTuple):
    """The attributions of one SAE, in logits. Tokens are counted from 0, the first after BOS."""

    # One value per nonzero activation.
    token_N: np.ndarray
    latent_N: np.ndarray
    activation_N: np.ndarray
    part_N: np.ndarray
    width: int
    # The other terms of an activation, by token.
    error_L: np.ndarray
    bias_L: np.ndarray
    skip_L: np.ndarray
    total_L: np.ndarray  # y · g

    @property
    def latents_L(self) -> np.ndarray:
        """The sum over latents, by token."""
        return np.bincount(self.token_N, self.part_N, len(self.total_L))

    @property
    def latents_M(self) -> np.ndarray:
        """The sum over tokens, by latent."""
        return np.bincount(self.latent_N, self.part_N, self.width)

    def strongest(self, token: int, top: int) -> list[tuple[int, float, float]]:
        """The latents with the largest attributions at a token, as (latent, activation, attribution)."""
        here = np.flatnonzero(self.token_N == token)
        here = here[np.argsort(-np.abs(self.part_N[here]), kind="stable")[:top]]
        return [(int(self.latent_N[n]), float(self.activation_N[n]), float(self.part_N[n])) for n in here]


class Integral(NamedTuple):
    """How accurate integrated gradients are."""

    baseline: float  # The logit difference at the start of the path.
    nodes: int
    gap: float  # The sum of attributions minus the gain on the path.


@dataclasses.dataclass(frozen=True)
class Attribution(Result):
    """The attribution of a logit difference to latents. BOS has no attribution, as no SAE is trained on it."""

    model: str
    tokens: tuple[str, ...]  # As text, after BOS, up to the token whose next-token logits are used.
    ids: tuple[int, ...]  # Including BOS.
    answer: tuple[int, str]
    against: tuple[int, str] | None  # None: the mean of all logits.
    metric: float  # The logit of `answer` minus that of `against`.
    parts: Mapping[str, Parts]  # By SAE.
    integral: Integral | None = None  # Only for integrated gradients.

    @property
    def question(self) -> str:
        """A description of the logit difference."""
        against = "the mean logit" if self.against is None else f"that of {self.against[1]!r}"
        return f"logit of {self.answer[1]!r} minus {against}, after {ending(self.tokens)!r}"

    def strongest(self, top: int = 20) -> list[tuple[str, int, int, float, float]]:
        """The largest attributions of either sign, as (SAE, latent, token, activation, attribution)."""
        found = [
            (name, int(parts.latent_N[n]), int(parts.token_N[n]), *map(float, (parts.activation_N[n], part)))
            for name, parts in self.parts.items()
            for n in np.argsort(-np.abs(parts.part_N), kind="stable")[:top]
            for part in (parts.part_N[n],)
        ]
        return sorted(found, key=lambda row: -abs(row[-1]))[:top]

    def sums(self) -> dict[str, dict[str, float]]:
        """Attributions summed over tokens, by SAE: latents, error, b_dec, skip (if any SAE has one), and all."""
        columns = {
            "latents": "latents_L",
            "error": "error_L",
            "b_dec": "bias_L",
            "skip": "skip_L",
            "all": "total_L",
        }
        if not any(parts.skip_L.any() for parts in self.parts.values()):
            del columns["skip"]
        return {
            name: {heading: float(getattr(parts, column).sum()) for heading, column in columns.items()}
            for name, parts in self.parts.items()
        }

    def records(self) -> Iterator[dict[str, object]]:
        """One row per attribution (`part`). `kind` is latent (where it fires), error, b_dec or skip.

        Positions count from 1, the first token after BOS. Only rows of kind latent have a latent and an activation.
        """
        for name, parts in self.parts.items():
            tokens = np.arange(len(parts.total_L))
            kinds = [("latent", parts.token_N, parts.latent_N, parts.activation_N, parts.part_N)] + [
                (kind, tokens, [None] * len(tokens), [None] * len(tokens), part_L)
                for kind, part_L in (
                    ("error", parts.error_L),
                    ("b_dec", parts.bias_L),
                    ("skip", parts.skip_L),
                )
            ]
            for kind, token_N, latent_N, activation_N, part_N in kinds:
                yield from records_of(
                    {
                        "sae": name,
                        "kind": kind,
                        "position": np.asarray(token_N) + 1,
                        "token": [self.tokens[t] for t in token_N],
                        "latent": latent_N,
                        "activation": activation_N,
                        "part": part_N,
                    }
                )

    def show(self, top: int = 20) -> None:
        """Prints the largest attributions, and their sums for each SAE."""
        tables.show(f"{self.question}: {self.metric:.3f}")
        if self.integral:
            tables.show(
                f"logit difference at the start of the path: {self.integral.baseline:.3f}; sum of attributions minus "
                f"gain: {self.integral.gap:.2g}, with {self.integral.nodes} nodes"
            )
        are_several = len(self.parts) > 1
        title = (
            f"{top} largest attributions{'' if are_several else f' of {next(iter(self.parts))}'}, in logits"
        )
        table = tables.Table(title=title)
        for heading in (*["SAE"] * are_several, "latent", "token", "activation", "attribution"):
            table.add_column(heading, justify="left" if heading in ("SAE", "token") else "right")
        for name, latent, token, activation, part in self.strongest(top):
            shown = (
                *[name] * are_several,
                f"{latent}",
                f"{token} {self.tokens[token]!r}",
                f"{activation:.4g}",
                f"{part:+.4f}",
            )
            table.add_row(*shown)
        tables.show(table)
        table = tables.Table(title="sum over tokens, in logits")
        table.add_column("SAE")
        sums_of = self.sums()
        for heading in next(iter(sums_of.values())):
            table.add_column(heading, justify="right")
        for name, sums in sums_of.items():
            table.add_row(name, *(f"{value:+.3f}" for value in sums.values()))
        tables.show(table)

    def write_html(
        self, path: str | pathlib.Path, top: int = 20, pngs: Mapping[str, bytes] | None = None
    ) -> None:
        """Writes a self-contained HTML page with maps of the attributions; a click on a token lists its latents.

        Args:
          path: the file to write.
          top: how many attributions are listed.
          pngs: further pictures for the page, by title.
        """
        maps = {
            title: {name: getattr(parts, column).tolist() for name, parts in self.parts.items()}
            for title, column in (("all latents together", "latents_L"), ("reconstruction error", "error_L"))
        }
        html.render(
            pathlib.Path(path),
            "analysis/attribution/attribution.html.jinja",
            about=self,
            strongest=self.strongest(top),
            sums=self.sums(),
            maps=maps,
            largest=max(abs(v) for rows in maps.values() for row in rows.values() for v in row) or 1.0,
            cells=[
                [parts.strongest(t, 12) for t in range(len(self.tokens))] for parts in self.parts.values()
            ],
            pictures={title: html.data_url(png) for title, png in (pngs or {}).items()},
        )

    def figure(self) -> matplotlib.figure.Figure:
        """Two maps of attributions, of all latents together and of the error: SAEs down, tokens across."""
        names, length = list(self.parts), len(self.tokens)
        width = min(max(0.32 * length, 3), 14) + 0.05 * min(max(map(len, names)), plotting.LABEL) + 0.6
        across = 2 if width <= 8 else 1
        figure, axes = plotting.new_figure(2 // across, across, width, 0.24 * len(names) + 1.8, sharey=True)
        maps = [
            np.stack([getattr(parts, column) for parts in self.parts.values()])
            for column in ("latents_L", "error_L")
        ]
        largest = max(max(np.abs(values).max() for values in maps), 1e-30)
        for axis, title, values in zip(
            axes.flat, ("all latents together", "reconstruction error"), maps, strict=True
        ):
            image = axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
            axis.set_title(title, fontsize=10)
            plotting.label_tokens(axis, self.tokens)
        for axis in axes[:, 0]:
            plotting.label_rows(axis, names)
            axis.set_ylabel("SAE", fontsize=8)
        bar = figure.colorbar(image, ax=figure.axes, fraction=0.05, pad=0.01)
        bar.set_label("attribution, logits", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        columns = plotting.columns_in(across * width, 10)
        figure.suptitle(plottable(f"{self.question}: {self.metric:.3f}", 200, columns), fontsize=10)
        return figure


def read_metric(
    gemma: Gemma, final_SxLxD: jax.Array, metric: Metric
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logit difference [S] from the output of the last block, and the ids [S] of its two tokens."""
    rows_S = jnp.arange(len(final_SxLxD))
    logits_SxV = predictions.logits(gemma, final_SxLxD[:, metric.last])
    tokens_1xV = jnp.arange(logits_SxV.shape[1])[None]

    def likeliest_but(token: jax.Array) -> jax.Array:
        return jnp.where(tokens_1xV == token.reshape(-1, 1), -jnp.inf, logits_SxV).argmax(1)

    answer_S = jnp.where(metric.answer == LIKELIEST, likeliest_but(metric.against), metric.answer)
    against_S = jnp.where(metric.against == LIKELIEST, likeliest_but(answer_S), metric.against)
    less_S = jnp.where(against_S == MEAN, logits_SxV.mean(1), logits_SxV[rows_S, against_S])
    return logits_SxV[rows_S, answer_S] - less_S, answer_S, against_S


class Pass(NamedTuple):
    """Results of one forward and backward pass."""

    metric_S: jax.Array
    answer_S: jax.Array
    against_S: jax.Array
    values: dict[Site, jax.Array]  # [S, L, D], by site that is read, before any addition
    gradients: dict[Site, jax.Array]  # [S, L, O], float32, by site with an addition


@functools.partial(jax.jit, static_argnames="read")
def _gradients(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    metric: Metric,
    added: Mapping[Site, jax.Array],
    read: tuple[Site, ...],
) -> Pass:
    """One forward and one backward pass: the gradient of each row's metric with respect to `added` [S, L, O]."""

    # The backward pass recomputes each block, as in `passes.importance`, so that a device holds the intermediate
    # values of only one block.
    @functools.partial(jax.checkpoint, static_argnums=0)
    def block(layer: int, x_SxLxD: jax.Array, added: Mapping[Site, jax.Array]) -> tuple:
        def add(more_SxLxO: jax.Array, y_SxLxO: jax.Array) -> jax.Array:
            return (y_SxLxO.astype(jnp.float32) + more_SxLxO).astype(y_SxLxO.dtype)

        write = {site: functools.partial(add, more) for site, more in added.items()}
        here = [site for site in read if site.layer == layer]
        gathered, only = gemma.gathered(), range(layer, layer + 1)
        return forward.run_blocks(gathered, x_SxLxD, tokens_SxL, only, read=here, write=write)

    def total(added: Mapping[Site, jax.Array]) -> tuple[jax.Array, tuple]:
        x_SxLxD = forward.embed(gemma.gathered(), tokens_SxL)
        x_SxLxD = sharding.constrain(gemma.mesh, x_SxLxD, sharding.TOKENS)
        values = {}
        for layer in gemma.layers:
            here = {site: more for site, more in added.items() if site.layer == layer}
            x_SxLxD, found = block(layer, x_SxLxD, here)
            values |= found
        measured = read_metric(gemma, x_SxLxD, metric)
        return measured[0].sum(), (*measured, values)

    (_, (*measured, values)), gradients = jax.value_and_grad(total, has_aux=True)(added)
    measured = sharding.constrain(gemma.mesh, measured, sharding.REPLICATED)
    return Pass(*measured, *sharding.constrain(gemma.mesh, (values, gradients), sharding.TOKENS))


@functools.partial(jax.jit, static_argnames="mesh")
def _first(mesh: jax.sharding.Mesh, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The first row of each [S, L, D], in float32."""
    first = tuple(x_SxLxD[0].astype(jnp.float32) for x_SxLxD in rows)
    return sharding.constrain(mesh, first, sharding.REPLICATED)


@functools.partial(jax.jit, static_argnames="mesh")
def _divided(
    mesh: jax.sharding.Mesh, subject: jumprelu.SAE, x_CxD: jax.Array, y_CxO: jax.Array, g_CxO: jax.Array
) -> dict[str, jax.Array]:
    """Activations and attributions of one SAE at C tokens."""
    highest = jax.lax.Precision.HIGHEST
    f_CxM = jumprelu.encode(subject, x_CxD)
    skip_CxO = jnp.zeros_like(y_CxO)
    if subject.W_skip is not None:
        skip_CxO = jnp.matmul(x_CxD, subject.W_skip, precision=highest)
    found = {
        "f": f_CxM,
        "part": f_CxM * jnp.matmul(g_CxO, subject.W_dec.T, precision=highest),
        "error_L": ((y_CxO - jumprelu.decode(subject, f_CxM, x_CxD)) * g_CxO).sum(1),
        "bias_L": (subject.b_dec[None] * g_CxO).sum(1),
        "skip_L": (skip_CxO * g_CxO).sum(1),
        "total_L": (y_CxO * g_CxO).sum(1),
    }
    return sharding.constrain(mesh, found, sharding.REPLICATED)


# How many activations, zero or not, the host holds at a time.
_DENSE = 2**24


def parts_of(
    scope: Scope, name: str, values: Mapping[Site, jax.Array], g_SxLxO: jax.Array, length: int
) -> Parts:
    """The attributions of one SAE at the first `length` tokens after BOS of row 0."""
    subject = scope.subjects[name]
    width = len(subject.sae.b_enc)
    rows = distributed.fetch(
        _first(scope.gemma.mesh, (values[subject.site], values[subject.spliced], g_SxLxO))
    )
    rows = [row_LxD[1 : 1 + length] for row_LxD in rows]
    # All chunks have one shape, so that there is one compilation.
    chunk = min(max(_DENSE // width, 1), -(-length // 16) * 16)
    fired, rest = [], []
    for start in range(0, length, chunk):
        some = [row_LxD[start : start + chunk] for row_LxD in rows]
        here = len(some[0])
        filled = [np.pad(row_CxD, ((0, chunk - here), (0, 0))) for row_CxD in some]
        found = distributed.fetch(_divided(scope.gemma.mesh, scope.placed[name], *filled))
        found = {key: value[:here] for key, value in found.items()}
        at = np.nonzero(found["f"])
        fired.append((start + at[0], at[1], found.pop("f")[at], found.pop("part")[at]))
        rest.append(found)
    joined = {key: np.concatenate([found[key] for found in rest]) for key in rest[0]}
    return Parts(*map(np.concatenate, zip(*fired, strict=True)), width, **joined)


def attribute(
    scope: Scope, prompt: str, answer: str | None = None, against: str | None = None, token: int = -1
) -> Attribution:
    """Attributes a logit difference to the latents of every SAE in a scope: activation times gradient.

    Args:
      scope: the model and SAEs.
      prompt: the text.
      answer: the token whose logit is attributed; None: the likeliest next token.
      against: the token whose logit is subtracted, or "mean" for the mean of all logits; None: the likeliest token
        other than the answer.
      token: the index of the prompt token whose next-token logits are used; a negative index counts from the end.

    Raises:
      ValueError: if there is no token at the index, or `answer` or `against` is not exactly one token.
    """
    ids, chosen = ask(scope, prompt, answer, against, token)
    placed = scope_lib.place_copies(scope, ids, 1)
    sites = tuple(dict.fromkeys(subject.spliced for subject in scope.subjects.values()))
    say(scope_lib.RUNNING)
    passed = differentiate(scope, placed, metric_after(ids, *chosen), zeros(scope, placed, sites))
    parts = {
        name: parts_of(scope, name, passed.values, passed.gradients[subject.spliced], len(ids) - 1)
        for name, subject in scope.subjects.items()
    }
    return tell(scope, ids, passed, parts)


def differentiate(
    scope: Scope, tokens_SxL: jax.Array, metric: Metric, added: Mapping[Site, jax.Array]
) -> Pass:
    """One forward and one backward pass that reads the sites of all SAEs whose output site is in `added`."""
    read = {site for s in scope.subjects.values() if s.spliced in added for site in (s.site, s.spliced)}
    return _gradients(scope.gemma, tokens_SxL, metric, added, tuple(sorted(read)))


def zeros(scope: Scope, tokens_SxL: jax.Array, sites: Sequence[Site]) -> dict[Site, jax.Array]:
    """Zeros [S, L, O] to add at each of the sites."""
    device = jax.NamedSharding(scope.gemma.mesh, sharding.TOKENS)
    widths = {site: site_width(scope.gemma.module, site) for site in sites}
    return {
        site: jnp.zeros((*tokens_SxL.shape, width), jnp.float32, device=device)
        for site, width in widths.items()
    }


def ask(
    scope: Scope, prompt: str, answer: str | None, against: str | None, token: int
) -> tuple[list[int], tuple[int, int]]:
    """The prompt's token ids up to `token`, with BOS, and the ids of the two answers (or `LIKELIEST`, `MEAN`)."""
    ids = scope_lib.prompt(scope, prompt)[1:]
    if not -len(ids) <= token < len(ids):
        raise InputError(f"there is no token {token}; the prompt has {len(ids)} tokens, counted from 0")
    chosen_answer = LIKELIEST if answer is None else scope_lib.one_token(scope, answer)
    if against == "mean":
        chosen_against = MEAN
    else:
        chosen_against = LIKELIEST if against is None else scope_lib.one_token(scope, against)
    if chosen_answer == chosen_against >= 0:
        raise InputError(
            f"answer and against are both {quoted(answer)}; give two different tokens, or leave out one"
        )
    return [masking.BOS, *ids[: token % len(ids) + 1]], (chosen_answer, chosen_against)


def metric_after(ids: Sequence[int], answer: int, against: int) -> Metric:
    """The logit difference after the last of these tokens."""
    return Metric(*map(np.int32, (len(ids) - 1, answer, against)))


def tell(
    scope: Scope,
    ids: Sequence[int],
    passed: Pass,
    parts: Mapping[str, Parts],
    integral: Integral | None = None,
) -> Attribution:
    """The attribution from row 0 of a pass."""
    text = scope.tokenizer.decode
    metric, answer, against = (
        value[0].item() for value in distributed.fetch((passed.metric_S, passed.answer_S, passed.against_S))
    )
    return Attribution(
        scope.config.model,
        tuple(text([token]) for token in ids[1:]),
        tuple(ids),
        (answer, text([answer])),
        None if against == MEAN else (against, text([against])),
        metric,
        parts,
        integral,
    )
