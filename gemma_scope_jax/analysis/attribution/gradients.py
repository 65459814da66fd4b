"""What has a part in a prediction: each latent's activation times the gradient of a difference of two logits.

The gradient g at a site is of the model as it is, with nothing spliced. A latent's part at a token is f (g · W_dec).
What else an activation y is made of has a part, too: the SAE's error, b_dec, and what a skip connection passes. All
of them add up to y · g.

Shapes: S rows, L tokens, N firings, D and O widths of the sites read and given, M latents, V vocabulary.
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
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import forward, masking, predictions
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site, site_width
from gemma_scope_jax.runtime import distributed, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import plottable, quoted
from gemma_scope_jax.saes import jumprelu

# In the place of a token's id.
LIKELIEST = -1  # But for the other of the two.
MEAN = -2  # Of all logits.


class Metric(NamedTuple):
    """The logit of one token less that of another, or less the mean of all; the same of all rows."""

    last: np.int32  # The position whose next token the logits are of.
    answer: np.int32
    against: np.int32


class Parts(NamedTuple):
    """Those of one SAE, by token behind BOS."""

    # Of each firing.
    token_N: np.ndarray
    latent_N: np.ndarray
    activation_N: np.ndarray
    part_N: np.ndarray
    width: int
    # Of what else there is in an activation.
    error_L: np.ndarray
    bias_L: np.ndarray
    skip_L: np.ndarray
    total_L: np.ndarray  # y · g

    @property
    def latents_L(self) -> np.ndarray:
        """Those of all latents."""
        return np.bincount(self.token_N, self.part_N, len(self.total_L))

    @property
    def latents_M(self) -> np.ndarray:
        """Each latent's on all tokens."""
        return np.bincount(self.latent_N, self.part_N, self.width)

    def strongest(self, token: int, top: int) -> list[tuple[int, float, float]]:
        """The latents with the largest parts on a token: each with its activation and part."""
        here = np.flatnonzero(self.token_N == token)
        here = here[np.argsort(-np.abs(self.part_N[here]), kind="stable")[:top]]
        return [(int(self.latent_N[n]), float(self.activation_N[n]), float(self.part_N[n])) for n in here]


class Integral(NamedTuple):
    """What integrated gradients are held against."""

    baseline: float  # The difference of logits where they begin.
    nodes: int
    gap: float  # The sum of all parts less what it should be.


@dataclasses.dataclass(frozen=True)
class Attribution(Result):
    """What has a part in a difference of two logits. BOS, on which no SAE was trained, has none."""

    model: str
    tokens: tuple[str, ...]  # As text, up to the one whose next token the logits are of: others do nothing.
    ids: tuple[int, ...]  # With BOS.
    answer: tuple[int, str]
    against: tuple[int, str] | None  # None: the mean of all logits.
    metric: float  # The logit of `answer` less that of `against`.
    parts: Mapping[str, Parts]  # by SAE
    integral: Integral | None = None  # Of integrated gradients.

    @property
    def question(self) -> str:
        """What was asked."""
        against = "the mean of all" if self.against is None else f"that of {self.against[1]!r}"
        return f"the logit of {self.answer[1]!r} less {against} behind {''.join(self.tokens[-8:])!r}"

    def strongest(self, top: int = 20) -> list[tuple[str, int, int, float, float]]:
        """The firings with the largest parts, of either sign: SAE, latent, token, activation, part."""
        found = [
            (name, int(parts.latent_N[n]), int(parts.token_N[n]), *map(float, (parts.activation_N[n], part)))
            for name, parts in self.parts.items()
            for n in np.argsort(-np.abs(parts.part_N), kind="stable")[:top]
            for part in (parts.part_N[n],)
        ]
        return sorted(found, key=lambda row: -abs(row[-1]))[:top]

    def sums(self) -> dict[str, dict[str, float]]:
        """By SAE, over all tokens: of latents, the error, b_dec, a skip connection if any has one, and of all."""
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
        """A row for each part: of latents that fire (`kind` latent), of the error, of b_dec and of a skip connection.

        Tokens are numbered from 1 as they stand behind BOS. What is no latent has none, and no activation.
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
        """Prints the strongest latents, and what each SAE's parts add up to."""
        tables.show(f"{self.question}: {self.metric:.3f}")
        if self.integral:
            told = f"baseline {self.integral.baseline:.3f}; {self.integral.nodes} nodes leave a gap of "
            tables.show(f"{told}{self.integral.gap:.2g}")
        are_several = len(self.parts) > 1
        title = f"strongest {top}" if are_several else f"strongest {top} of {next(iter(self.parts))}"
        table = tables.Table(title=title)
        for heading in (*["SAE"] * are_several, "latent", "token", "activation", "part"):
            table.add_column(
                heading, justify="left" if heading in ("SAE", "token") else "right", overflow="fold"
            )
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
        table = tables.Table(title="in all")
        table.add_column("SAE", overflow="fold")
        sums_of = self.sums()
        for heading in next(iter(sums_of.values())):
            table.add_column(heading, justify="right")
        for name, sums in sums_of.items():
            table.add_row(name, *(f"{value:+.3f}" for value in sums.values()))
        tables.show(table)

    def write_html(
        self, path: str | pathlib.Path, top: int = 20, pngs: Mapping[str, bytes] | None = None
    ) -> None:
        """Writes a page that needs no network: maps of parts, a token's latents by a click, PNGs by their titles."""
        maps = {
            title: {name: getattr(parts, column).tolist() for name, parts in self.parts.items()}
            for title, column in (("latents", "latents_L"), ("errors", "error_L"))
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
        """Two maps, of latents and of errors: SAEs down, tokens across, the sum of parts as colour."""
        names, length = list(self.parts), len(self.tokens)
        width = min(max(0.32 * length, 3), 14) + 0.05 * min(max(map(len, names)), plotting.LABEL) + 0.6
        figure, axes = plotting.new_figure(1, 2, width, 0.24 * len(names) + 1.8, sharey=True)
        maps = [
            np.stack([getattr(parts, column) for parts in self.parts.values()])
            for column in ("latents_L", "error_L")
        ]
        largest = max(max(np.abs(values).max() for values in maps), 1e-30)
        for axis, title, values in zip(axes[0], ("latents", "error"), maps, strict=True):
            image = axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
            axis.set_title(title, fontsize=10)
            plotting.label_tokens(axis, self.tokens)
        plotting.label_rows(axes[0, 0], names)
        figure.colorbar(image, ax=figure.axes, fraction=0.05, pad=0.01).set_label("part, logits", fontsize=8)
        figure.suptitle(plottable(f"{self.question}: {self.metric:.3f}", 200), fontsize=10)
        return figure


def read_metric(
    gemma: Gemma, final_SxLxD: jax.Array, metric: Metric
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The difference [S] of logits, from the stream behind the last block, and the tokens [S] that it is of."""
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
    metric_S: jax.Array
    answer_S: jax.Array
    against_S: jax.Array
    values: dict[Site, jax.Array]  # [S, L, D] of the sites read, before anything was added
    gradients: dict[Site, jax.Array]  # [S, L, O], float32, by site that something was added to


@functools.partial(jax.jit, static_argnames="read")
def _gradients(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    metric: Metric,
    added: Mapping[Site, jax.Array],
    read: tuple[Site, ...],
) -> Pass:
    """One pass forwards and one back, for the gradient of each row's metric by what is added [S, L, O] at sites."""

    # Each block is computed again on the way back, as in `passes.importance`: what it needs inside lies on a
    # chip for one block at a time.
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
    """Activations and parts on some tokens."""
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


# So many activations are on the host at a time, fired or not.
_DENSE = 2**24


def parts_of(
    scope: Scope, name: str, values: Mapping[Site, jax.Array], g_SxLxO: jax.Array, length: int
) -> Parts:
    """Those of one SAE on the `length` tokens behind BOS of the first row."""
    subject = scope.subjects[name]
    width = len(subject.sae.b_enc)
    rows = distributed.fetch(
        _first(scope.gemma.mesh, (values[subject.site], values[subject.spliced], g_SxLxO))
    )
    rows = [row_LxD[1 : 1 + length] for row_LxD in rows]
    # Of one shape, so that they are compiled once.
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
    """What has a part in a difference of two logits, by every SAE of a scope: gradient times activation.

    Args:
      scope: the model and SAEs.
      prompt: the text.
      answer: the token whose logit it is; None: the likeliest.
      against: the token whose logit is taken off, or "mean", of all; None: the likeliest but for the answer.
      token: behind which of the prompt's tokens; below 0 from its end on.

    Raises:
      ValueError: there is no such token, or an answer is none or several.
    """
    ids, chosen = ask(scope, prompt, answer, against, token)
    placed = scope_lib.place_copies(scope, ids, 1)
    sites = tuple(dict.fromkeys(subject.spliced for subject in scope.subjects.values()))
    passed = differentiate(scope, placed, metric_behind(ids, *chosen), zeros(scope, placed, sites))
    parts = {
        name: parts_of(scope, name, passed.values, passed.gradients[subject.spliced], len(ids) - 1)
        for name, subject in scope.subjects.items()
    }
    return tell(scope, ids, passed, parts)


def differentiate(
    scope: Scope, tokens_SxL: jax.Array, metric: Metric, added: Mapping[Site, jax.Array]
) -> Pass:
    """One pass forwards and one back, with the sites read that SAEs of those in `added` read and give."""
    read = {site for s in scope.subjects.values() if s.spliced in added for site in (s.site, s.spliced)}
    return _gradients(scope.gemma, tokens_SxL, metric, added, tuple(sorted(read)))


def zeros(scope: Scope, tokens_SxL: jax.Array, sites: Sequence[Site]) -> dict[Site, jax.Array]:
    """What adds nothing to rows of these tokens, at sites."""
    device = jax.NamedSharding(scope.gemma.mesh, sharding.TOKENS)
    widths = {site: site_width(scope.gemma.module, site) for site in sites}
    return {
        site: jnp.zeros((*tokens_SxL.shape, width), jnp.float32, device=device)
        for site, width in widths.items()
    }


def ask(
    scope: Scope, prompt: str, answer: str | None, against: str | None, token: int
) -> tuple[list[int], tuple[int, int]]:
    """The prompt's ids up to the token, with BOS, and the ids of the two answers or what stands for them."""
    ids = scope_lib.prompt(scope, prompt)[1:]
    if not -len(ids) <= token < len(ids):
        raise InputError(f"there is no token {token}; the prompt has {len(ids)}, counted from 0")
    chosen_answer = LIKELIEST if answer is None else scope_lib.one_token(scope, answer)
    if against == "mean":
        chosen_against = MEAN
    else:
        chosen_against = LIKELIEST if against is None else scope_lib.one_token(scope, against)
    if chosen_answer == chosen_against >= 0:
        raise InputError(
            f"answer and against are both {quoted(answer)}; give two tokens, or leave one of them out"
        )
    return [masking.BOS, *ids[: token % len(ids) + 1]], (chosen_answer, chosen_against)


def metric_behind(ids: Sequence[int], answer: int, against: int) -> Metric:
    """Behind the last of these tokens."""
    return Metric(*map(np.int32, (len(ids) - 1, answer, against)))


def tell(
    scope: Scope,
    ids: Sequence[int],
    passed: Pass,
    parts: Mapping[str, Parts],
    integral: Integral | None = None,
) -> Attribution:
    """What is said of the first row of a pass."""
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
