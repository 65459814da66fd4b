"""A prompt through the layers: activations, reconstructions and delta losses of SAEs at many layers.

The prompt runs through Gemma once without changes, and once for each SAE with the activations of its site replaced by
its reconstruction. SAEs of the same kind of site share forward passes, with one row for each SAE.

Shapes: E SAEs, L tokens, O width of the site that is replaced, S rows in a pass.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import matplotlib.figure
import numpy as np

from gemma_scope_jax.analysis.layers import logit_lens as lens_lib
from gemma_scope_jax.analysis.session import (
    RUNNING,
    Scope,
    is_kept,
    one_token,
    place_copies,
    prompt,
    reconstruct,
)
from gemma_scope_jax.display import html, plotting, tables
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import interventions, passes, tokenizer
from gemma_scope_jax.models.sites import SITES, Site
from gemma_scope_jax.runtime import distributed, reporting, sharding
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes import attached

# The measured quantities: heading → (field of `Flow`, colour scale in pictures).
_MEASURED = {
    "‖y‖": ("norm_ExL", "log"),
    "L0": ("l0_ExL", "linear"),
    "‖y − ŷ‖ / ‖y‖": ("error_ExL", "linear"),
    "delta loss, nats": ("delta_loss_ExL", "signed"),
}


@dataclasses.dataclass(frozen=True)
class Flow(Result):
    """Measurements of SAEs on each token of a prompt except BOS. SAEs are ordered by kind of site, then by layer."""

    model: str
    tokens: tuple[str, ...]  # the texts of the L tokens
    names: tuple[str, ...]  # of the E SAEs
    kinds: tuple[str, ...]  # of each SAE's site, such as resid_post or mlp_in → mlp_out
    layers: tuple[int, ...]  # of each SAE
    norm_ExL: np.ndarray  # ‖y‖, the norm of the activation that is replaced
    l0_ExL: np.ndarray
    error_ExL: np.ndarray  # ‖y − ŷ‖ / ‖y‖
    # In nats: the loss on the next token with all tokens spliced, less the loss without splicing. NaN where no next
    # token is scored, as at the last token.
    delta_loss_ExL: np.ndarray
    lens: lens_lib.Lens | None  # over the SAEs of resid_post; None if there is no such SAE

    def of_kind(self, kind: str) -> list[int]:
        """The indices of the SAEs of one kind of site, from the first layer to the last."""
        return [number for number, of in enumerate(self.kinds) if of == kind]

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each token and SAE; `lens` has its own records."""
        for number, name in enumerate(self.names):
            yield from records_of(
                {
                    "sae": name,
                    "kind": self.kinds[number],
                    "layer": self.layers[number],
                    "position": np.arange(len(self.tokens)) + 1,
                    "token": list(self.tokens),
                    "norm": self.norm_ExL[number],
                    "l0": self.l0_ExL[number],
                    "error": self.error_ExL[number],
                    "delta_loss": self.delta_loss_ExL[number],
                }
            )

    def show(self) -> None:
        """Prints means over the tokens, and the logit lens of the last token."""
        table = tables.Table(title=f"{printable(self.model)}, means over {len(self.tokens)} tokens")
        table.add_column("SAE")
        for heading in (*_MEASURED, "max delta loss"):
            table.add_column(heading, justify="right")
        table.add_column("at token")
        for number, name in enumerate(self.names):
            means = [_mean(getattr(self, field)[number]) for field, _ in _MEASURED.values()]
            shown = [f"{means[0]:,.0f}", f"{means[1]:.1f}", f"{means[2]:.1%}", f"{means[3]:+.3f}"]
            delta_L = self.delta_loss_ExL[number]
            if np.isfinite(delta_L).any():
                worst = int(np.nanargmax(delta_L))
                shown += [f"{delta_L[worst]:+.2f}", repr(self.tokens[worst])]
            else:
                shown += ["", ""]
            table.add_row(name, *shown)
        tables.show(table)
        if self.lens:
            self.lens.show()

    def figure(self) -> matplotlib.figure.Figure:
        """Heat maps of layers × tokens, one for each quantity and kind of site; with many tokens, in one column."""
        kinds = list(dict.fromkeys(self.kinds))
        tallest = max(map(self.kinds.count, kinds))
        width = min(max(0.14 * len(self.tokens) + 1.3, 3.4), 14)
        across = next(number for number in (4, 2, 1) if number * width <= 16)
        rows = len(_MEASURED) // across
        figure, axes = plotting.new_figure(len(kinds) * rows, across, width, 0.17 * tallest + 1.4)
        for number, kind in enumerate(kinds):
            numbers = self.of_kind(kind)
            of_kind = axes[number * rows : (number + 1) * rows]
            for axis, (title, (field, scale)) in zip(of_kind.flat, _MEASURED.items(), strict=True):
                plotting.heat_map(figure, axis, getattr(self, field)[numbers], scale, f"{kind}: {title}")
                axis.set_yticks([])
                axis.set_xticks([])
            for axis in of_kind[:, 0]:
                plotting.label_rows(axis, self._labels(numbers))
                axis.set_ylabel("layer", fontsize=8)
            for axis in of_kind[-1]:
                plotting.label_tokens(axis, self.tokens)
        return figure

    def _labels(self, numbers: Sequence[int]) -> list[str]:
        """The layers of SAEs of one kind, or their names if several share a layer."""
        layers = [self.layers[number] for number in numbers]
        if len(set(layers)) == len(layers):
            return list(map(str, layers))
        return [self.names[number] for number in numbers]

    def write_html(self, path: str | pathlib.Path) -> None:
        """Writes a page that needs no network, with the heat maps, the logit lens as a table, and the means."""
        means = {
            name: [_mean(getattr(self, field)[number]) for field, _ in _MEASURED.values()]
            for number, name in enumerate(self.names)
        }
        lens = self.lens
        grids = {}
        if lens:
            grids = {
                "Residual stream": lens.grid(lens.stream),
                "SAE reconstructions": lens.grid(lens.reconstruction),
            }
        html.render(
            pathlib.Path(path), "analysis/layers/flow.html.jinja",
            model=self.model, tokens=self.tokens, seen=plotting.seen,
            picture=html.data_url(plotting.png(self.figure(), 110)), measured=list(_MEASURED), means=means,
            rows=lens.rows if lens else (), grids=grids,
            answer=lens.texts[int(lens.answer_L[0])] if lens and lens.is_given else None,
        )  # fmt: skip


def _mean(values_L: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    known = values_L[np.isfinite(values_L)]
    return float(known.mean()) if known.size else float("nan")


def flow(scope: Scope, text: str, answer: str | None = None) -> Flow:
    """Runs a prompt through Gemma once, and once more for each SAE with its reconstruction spliced in.

    Args:
      scope: the model and its SAEs.
      text: the prompt.
      answer: the token whose probability and rank the logit lens follows through the layers; None: the model's own
        prediction at each token.

    Returns:
      The measurements of every SAE, and the logit lens of the residual stream.

    Raises:
      ValueError: if the text has no tokens, or the answer is not exactly one token.
    """
    row = prompt(scope, text)
    answer_token = None if answer is None else one_token(scope, answer)
    placed = place_copies(scope, row, 1)
    reporting.say(RUNNING)
    _, values, final_SxLxD = passes.clean(scope.gemma, placed, scope.sites)
    names = sorted(scope.subjects, key=lambda name: _order(scope.subjects[name]))
    found, streams = {}, {}
    for name in names:
        subject = scope.subjects[name]
        x, y = values[subject.site], values[subject.spliced]
        made = reconstruct(scope.gemma.mesh, scope.placed[name], x, y)
        made["l0_L"] = (made.pop("f_LxM") > 0).sum(1)
        found[name] = distributed.fetch(made)
        if subject.site == subject.spliced and subject.site.kind == "resid_post":
            streams[name] = found[name]["y_LxO"]
    here = slice(1, len(row))
    delta = _delta_losses(scope, row, {name: found[name]["recon_LxO"] for name in names})
    followed = None
    if streams:
        reporting.say("Computing the logit lens …")
        recon = {name: found[name]["recon_LxO"] for name in streams}
        final_LxD = distributed.fetch(_first(scope.gemma.mesh, final_SxLxD))
        streams, recon = ({name: x[here] for name, x in of.items()} for of in (streams, recon))
        followed = _lens(scope, row[1:], streams, recon, final_LxD[here], answer_token)
    return Flow(
        model=scope.config.model,
        tokens=tuple(scope.tokenizer.decode([token]) for token in row[1:]),
        names=tuple(names),
        kinds=tuple(_kind(scope.subjects[name]) for name in names),
        layers=tuple(scope.subjects[name].spliced.layer for name in names),
        norm_ExL=np.stack([found[name]["norm_L"][here] for name in names]),
        l0_ExL=np.stack([found[name]["l0_L"][here] for name in names]),
        error_ExL=np.stack([found[name]["error_L"][here] for name in names]),
        delta_loss_ExL=np.stack([delta[name][here] for name in names]),
        lens=followed,
    )


def _order(subject: attached.Subject) -> tuple[int, int, int]:
    kinds = list(SITES)
    return kinds.index(subject.spliced.kind), kinds.index(subject.site.kind), subject.spliced.layer


def _kind(subject: attached.Subject) -> str:
    read, spliced = subject.site.kind, subject.spliced.kind
    return spliced if read == spliced else f"{read} → {spliced}"


@functools.partial(jax.jit, static_argnames="mesh")
def _first(mesh: jax.sharding.Mesh, x_SxLxD: jax.Array) -> jax.Array:
    return sharding.constrain(mesh, x_SxLxD[0], sharding.REPLICATED)


def _delta_losses(
    scope: Scope, row_L: Sequence[int], recon: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """By SAE: the delta loss [L] of its reconstruction [L, O]; NaN where no next token is scored."""
    by_kind: dict[str, list[str]] = {}
    for name in recon:
        by_kind.setdefault(scope.subjects[name].spliced.kind, []).append(name)
    made = {}
    with reporting.bar("Splicing", "SAE", len(recon), compiles=1) as bar:
        for names in by_kind.values():
            sites = tuple(dict.fromkeys(scope.subjects[name].spliced for name in names))
            # As many tokens in a pass as in an evaluation. One row of each pass stays without changes.
            config = scope.config
            most = config.evaluation.rows_per_batch * config.data.context_length // len(row_L)
            rows = -(-max(2, min(most, len(names) + 1)) // scope.gemma.mesh.size) * scope.gemma.mesh.size
            for first in range(0, len(names), rows - 1):
                some = names[first : first + rows - 1]
                delta_RxL = _delta_losses_of(scope, row_L, sites, some, recon, rows)
                made |= dict(zip(some, delta_RxL, strict=True))
                bar.update(len(some))
    return made


def _delta_losses_of(
    scope: Scope,
    row_L: Sequence[int],
    sites: tuple[Site, ...],
    names: Sequence[str],
    recon: Mapping[str, np.ndarray],
    rows: int,
) -> np.ndarray:
    """The delta losses [R, L] of one pass; its last rows are clean, so both losses come from the same program."""
    tokens_SxL = place_copies(scope, row_L, rows)
    number_S = np.full(rows, -1, np.int32)
    replacement_SxLxO = np.zeros((*tokens_SxL.shape, recon[names[0]].shape[-1]), recon[names[0]].dtype)
    for row, name in enumerate(names):
        number_S[row] = sites.index(scope.subjects[name].spliced)
        replacement_SxLxO[row] = recon[name]
    placed = jax.NamedSharding(scope.gemma.mesh, sharding.TOKENS)
    replacement_SxLxO = jax.make_array_from_callback(
        replacement_SxLxO.shape, placed, lambda index: replacement_SxLxO[index]
    )
    is_kept_SxL = is_kept(scope.gemma.mesh, tokens_SxL)
    write = {
        site: interventions.splice(is_kept_SxL & (number_S == number)[:, None], replacement_SxLxO)
        for number, site in enumerate(sites)
    }
    final_SxLxD, _ = passes.written(scope.gemma, tokens_SxL, write)
    found = distributed.fetch(passes.loss(scope.gemma, final_SxLxD, tokens_SxL, is_kept_SxL))
    loss_SxL = np.where(found["scored_SxL"] > 0, found["loss_SxL"], np.nan)
    return loss_SxL[: len(names)] - loss_SxL[-1:]


def _lens(
    scope: Scope,
    tokens: Sequence[int],
    streams: Mapping[str, np.ndarray],
    recon: Mapping[str, np.ndarray],
    final_LxD: np.ndarray,
    answer: int | None,
) -> lens_lib.Lens:
    """The logit lens of streams and reconstructions [L, D] by SAE, and of the final stream [L, D]."""
    answer_L = np.full(len(tokens), 0 if answer is None else answer)
    if answer is None:
        (answer_L,) = lens_lib.predictions(scope.gemma, final_LxD[None], answer_L).token
    everything = np.stack([*streams.values(), *recon.values(), final_LxD])
    seen = lens_lib.predictions(scope.gemma, everything, answer_L)
    stream, reconstruction, output = (
        lens_lib.Predictions(*(part[rows] for part in seen))
        for rows in (slice(len(streams)), slice(len(streams), -1), slice(-1, None))
    )
    layers = [str(scope.subjects[name].site.layer) for name in streams]
    is_one_each = len(set(layers)) == len(layers)
    used = {int(token) for token in (*seen.token.flat, *answer_L)}
    text_of = tokenizer.token_texts(scope.tokenizer.decode)
    return lens_lib.Lens(
        tokens=tuple(scope.tokenizer.decode([token]) for token in tokens),
        layers=tuple(layers if is_one_each else streams),
        answer_L=answer_L,
        is_given=answer is not None,
        stream=stream,
        reconstruction=reconstruction,
        output=output,
        texts={token: text_of(token) for token in used},
    )
