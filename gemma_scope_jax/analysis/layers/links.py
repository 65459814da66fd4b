"""Links from a latent to the latents of later SAEs: by weights, by a derivative, and by ablation.

The latent's part of its site's activations is f W_dec, at the tokens on which it fires. The rest of the activation,
including the SAE's error, is not changed.

Shapes: S rows, L tokens, M latents of a later SAE, D and O widths of sites.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from gemma_scope_jax.analysis import decoder_directions
from gemma_scope_jax.analysis.session import RUNNING, Scope, is_kept, place_prompts, prompt
from gemma_scope_jax.data import batching
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import forward
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import SITES, Site, blocks_needed
from gemma_scope_jax.runtime import distributed, ranges, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable, quoted
from gemma_scope_jax.saes import attached, jumprelu

_BLOCK = 2**14  # Latents whose weights are in float64 at a time.


@dataclasses.dataclass(frozen=True)
class Links(Result):
    """Links from one latent to the latents of later SAEs: arrays [M] by SAE, in the order of their sites in Gemma.

    Attributions and effects are sums over tokens, divided by the number of firings of the latent. The stream's norm
    and the activations grow from layer to layer, so SAEs are compared in units of their own mean activation.
    """

    name: str
    latent: int
    activations: int  # the number of positions measured
    firings: int  # of the latent on these positions
    activation: float  # of the latent, mean where it fires
    # W_dec[latent] · W_enc and their cosine, in the residual stream; None where they do not meet in the stream.
    weight: Mapping[str, np.ndarray | None]
    cosine: Mapping[str, np.ndarray | None]
    # The linearised change of the pre-activation, where the later latent fires.
    attribution: Mapping[str, np.ndarray]
    effect: Mapping[str, np.ndarray]  # the later activation, less the same with the latent ablated
    frequency: Mapping[str, np.ndarray]  # the share of positions on which each later latent fires
    unit: Mapping[str, float]  # the mean activation of a later SAE's latents where they fire
    layer: Mapping[str, int]  # of the later SAEs

    def strongest(self, top: int = 20) -> list[tuple[str, int]]:
        """The (SAE, latent) pairs with the largest absolute effects, in units of each SAE's mean activation."""
        size = {name: np.abs(self.in_units(self.effect, name)) for name in self.effect}
        places = [(name, int(latent)) for name, of in size.items() for latent in np.argsort(-of)[:top]]
        places.sort(key=lambda place: -size[place[0]][place[1]])
        return [(name, latent) for name, latent in places[:top] if size[name][latent] > 0]

    def in_units(self, of: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """Attributions or effects [M] divided by the later SAE's mean activation; 0 if no latent of it fires."""
        return of[name] / (self.unit[name] or 1)

    def is_reached(self, name: str) -> np.ndarray:
        """Which latents [M] of a later SAE are reached: have a nonzero attribution or effect."""
        return (self.attribution[name] != 0) | (self.effect[name] != 0)

    def correlation(self, what: Mapping[str, np.ndarray | None], name: str) -> float:
        """The correlation of attributions or weights with effects, over the reached latents; NaN if undefined."""
        reached_M = self.is_reached(name)
        if what[name] is None or reached_M.sum() < 3:
            return float("nan")
        x, y = what[name][reached_M], self.effect[name][reached_M]
        return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else float("nan")

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each later latent with a nonzero attribution or effect."""
        for name, effect_M in self.effect.items():
            latents = np.flatnonzero(self.is_reached(name))
            columns = {what: getattr(self, what)[name] for what in ("weight", "cosine", "attribution")}
            columns |= {"effect": effect_M, "frequency": self.frequency[name]}
            yield from records_of(
                {"sae": name, "layer": self.layer[name], "latent": latents}
                | {what: of if of is None else of[latents] for what, of in columns.items()}
            )

    def show(self, top: int = 20) -> None:
        """Prints the later latents with the largest effects, and correlations with attributions and weights."""
        title = (
            f"latents fed by latent {self.latent} of {printable(self.name, 60)}; "
            f"it fires on {self.firings:,} of {self.activations:,} "
            f"activations, mean {self.activation:.3g}"
        )
        table = tables.Table("SAE", title=title, keys=2)
        for heading in ("latent", "effect", "attribution", "effect / mean", "weight", "cosine", "fires on"):
            table.add_column(heading, justify="right")
        for name, latent in self.strongest(top):
            numbers = [self.effect[name][latent], self.attribution[name][latent]]
            numbers += [self.in_units(self.effect, name)[latent]]
            numbers += [None if of[name] is None else of[name][latent] for of in (self.weight, self.cosine)]
            shown = ["–" if number is None else f"{number:+.3g}" for number in numbers]
            fires = f"{self.frequency[name][latent]:.1%}"
            table.add_row(name, str(latent), *shown, fires)
        tables.show(table)
        table = tables.Table(title="correlations with effects")
        table.add_column("SAE")
        for heading in ("reached latents", "attributions", "weights"):
            table.add_column(heading, justify="right")
        for name in self.effect:
            found = (self.correlation(of, name) for of in (self.attribution, self.weight))
            shown = ["–" if np.isnan(r) else f"{r:.2f}" for r in found]
            table.add_row(name, str(self.is_reached(name).sum()), *shown)
        tables.show(table)

    def figure(self) -> matplotlib.figure.Figure:
        """Effects against attributions and against weights, with a point for each reached latent."""
        figure, ((left, right),) = plotting.new_figure(1, 2, 6, 5)
        figure.suptitle(f"latent {self.latent} of {plottable(self.name, 100)}", fontsize=10)
        image = None
        layers = self.layer.values()
        for axis, what, title in (
            (left, self.attribution, "attribution, in mean activations of the later SAE"),
            (right, self.weight, "weight, W_dec · W_enc"),
        ):
            axis.axhline(0, color="#bbbbbb", lw=0.8)
            axis.axvline(0, color="#bbbbbb", lw=0.8)
            known = [name for name in self.effect if what[name] is not None]
            for name in known:
                reached_M = self.is_reached(name)
                x_M = self.in_units(what, name) if axis is left else what[name]
                x, y = x_M[reached_M], self.in_units(self.effect, name)[reached_M]
                of_sae = {"c": np.full(len(x), self.layer[name]), "vmin": min(layers), "vmax": max(layers)}
                image = axis.scatter(x, y, s=7, cmap="viridis", alpha=0.7, linewidths=0, **of_sae)
            r = [self.correlation(what, name) for name in known]
            if not np.isnan(r).all():
                axis.set_title(f"median correlation over SAEs {np.nanmedian(r):.2f}", fontsize=9)
            axis.set_xlabel(title)
            axis.set_ylabel("effect of ablation, in mean activations of the later SAE")
        for name, latent in self.strongest(4):
            x, y = (float(self.in_units(of, name)[latent]) for of in (self.attribution, self.effect))
            side = {"xytext": (-4, 2), "ha": "right"} if x > 0 else {"xytext": (4, 2), "ha": "left"}
            left.annotate(
                f"{plottable(name)} {latent}", (x, y), textcoords="offset points", fontsize=6, **side
            )
        low, high = left.get_xlim()
        left.plot([low, high], [low, high], color="#d93025", lw=0.8, zorder=0)
        if image is not None and len(set(layers)) > 1:
            bar = figure.colorbar(image, ax=right, ticks=matplotlib.ticker.MaxNLocator(integer=True))
            bar.set_label("layer of the later SAE", fontsize=8)
        return figure


def links(
    scope: Scope, name: str, latent: int, to: str | None = None, rows: int = 8, text: str | None = None
) -> Links:
    """Measures the links from a latent to later SAEs, with a forward pass with derivatives and an ablated pass.

    Args:
      scope: the model and its SAEs.
      name: the name of the latent's SAE.
      latent: the number of the latent.
      to: the name of the later SAE; None: every SAE that reads a site after the one this SAE reconstructs.
      rows: how many held-out rows to use, in the order of an evaluation.
      text: a prompt to use instead of held-out rows.

    Returns:
      The links to each later SAE.

    Raises:
      ValueError: if there is no such SAE or latent, no SAE is later, or the latent does not fire on these tokens.
    """
    scope.check_latent(name, latent)
    subject = scope.subjects[name]
    later = _later(scope, name, to)
    sites = tuple(dict.fromkeys(scope.subjects[other].site for other in later))
    W_enc, W_dec = np.asarray(subject.sae.W_enc), np.asarray(subject.sae.W_dec)
    reader = (W_enc[:, latent], subject.sae.b_enc[latent], subject.sae.threshold[latent])
    totals: dict[str, dict[str, np.ndarray]] = {other: {} for other in later}
    activations, firings, strength = 0, 0, 0.0
    for tokens_SxL, is_kept_SxL in _batches(scope, rows, text):
        (f_SxL, kept_SxL), passed = _passed_on(
            scope.gemma, tokens_SxL, is_kept_SxL, reader, W_dec[latent], subject.site, subject.spliced, sites
        )
        f_SxL, kept_SxL = distributed.fetch((f_SxL, kept_SxL))
        activations += int(kept_SxL.sum())
        firings += int((f_SxL > 0).sum())
        strength += float(f_SxL.sum(dtype=np.float64))
        for other in later:
            site = scope.subjects[other].site
            found = distributed.fetch(
                _sums(scope.gemma.mesh, scope.placed[other], is_kept_SxL, *passed[site])
            )
            for key, value_M in found.items():
                totals[other][key] = totals[other].get(key, 0) + value_M.astype(np.float64)
    if not firings:
        raise InputError(
            f"latent {latent} of {name} does not fire on these {activations:,} activations; give more rows "
            "or a text on which it fires"
        )
    by_weight = {other: virtual_weights(scope, subject, latent, scope.subjects[other]) for other in later}
    return Links(
        name=name,
        latent=latent,
        activations=activations,
        firings=firings,
        activation=strength / firings,
        weight={other: found[0] for other, found in by_weight.items()},
        cosine={other: found[1] for other, found in by_weight.items()},
        attribution={other: sums["attribution_M"] / firings for other, sums in totals.items()},
        effect={other: sums["effect_M"] / firings for other, sums in totals.items()},
        frequency={other: sums["fired_M"] / activations for other, sums in totals.items()},
        unit={other: float(s["f_M"].sum() / max(s["fired_M"].sum(), 1)) for other, s in totals.items()},
        layer={other: scope.subjects[other].site.layer for other in later},
    )


def _position(site: Site) -> tuple[int, int]:
    """A key that sorts sites in the order in which Gemma computes them."""
    return site.layer, list(SITES).index(site.kind)


def _later(scope: Scope, name: str, to: str | None) -> list[str]:
    given = scope.subjects[name].spliced
    if to is not None and to not in scope.subjects:
        raise InputError(f"there is no SAE {quoted(to)}; choose from {', '.join(scope.subjects)}")
    later = [o for o, subject in scope.subjects.items() if _position(subject.site) > _position(given)]
    if to is not None and to not in later:
        raise InputError(f"{to} reads {scope.subjects[to].site}, which is not after {given} of {name}")
    if not later:
        raise InputError(f"no SAE reads a site after {given} of {name}; open SAEs at several layers")
    chosen = later if to is None else [to]
    return sorted(chosen, key=lambda other: _position(scope.subjects[other].site))


def _batches(scope: Scope, rows: int, text: str | None) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields rows of tokens on the devices and a mask of counted positions, with one row for each device."""
    if text is not None:
        tokens_SxL = place_prompts(scope, [prompt(scope, text)])
        reporting.say(RUNNING)
        yield tokens_SxL, is_kept(scope.gemma.mesh, tokens_SxL)
        return
    ranges.check("rows", rows, ranges.COUNT)
    held_out = scope.held_out()
    counts = batching.counts_of(scope.config)
    count = min(rows, len(held_out))
    with reporting.bar("Measuring links", "row", count, compiles=1) as bar:
        for batch in batching.batches(scope.gemma.mesh, held_out, count, 1, counts):
            yield batch.tokens_SxL, batch.is_kept_SxL
            bar.update(batch.count)


@functools.partial(jax.jit, static_argnames=("site", "spliced", "later"))
def _passed_on(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    reader: tuple[jax.Array, jax.Array, jax.Array],
    direction_O: jax.Array,
    site: Site,
    spliced: Site,
    later: tuple[Site, ...],
) -> tuple[tuple[jax.Array, jax.Array], dict[Site, tuple[jax.Array, jax.Array, jax.Array]]]:
    """The latent's activations and the counted positions [S, L], and three arrays [S, L, D] for each later site.

    The three arrays are the site's activations, their derivative with respect to a factor (at 1) on the latent's part
    f W_dec, and the activations with the latent ablated.
    """
    gemma = gemma.gathered()
    x_SxLxD = sharding.constrain(gemma.mesh, forward.embed(gemma, tokens_SxL), sharding.TOKENS)
    x_SxLxD, _ = forward.run_blocks(gemma, x_SxLxD, tokens_SxL, range(site.layer))
    block = range(site.layer, site.layer + 1)
    _, here = forward.run_blocks(gemma, x_SxLxD, tokens_SxL, block, read=(site,))
    w_D, bias, threshold = reader
    highest = jax.lax.Precision.HIGHEST
    pre_SxL = jnp.matmul(here[site].astype(jnp.float32), w_D, precision=highest) + bias
    f_SxL = jnp.where((pre_SxL > threshold) & is_kept_SxL, jax.nn.relu(pre_SxL), 0)
    part_SxLxO = f_SxL[..., None] * direction_O[None, None]

    def at_later(share: jax.Array) -> dict[Site, jax.Array]:
        def change(y_SxLxO: jax.Array) -> jax.Array:
            return (y_SxLxO.astype(jnp.float32) + (share - 1) * part_SxLxO).astype(y_SxLxO.dtype)

        layers = range(site.layer, blocks_needed(later))
        return forward.run_blocks(gemma, x_SxLxD, tokens_SxL, layers, read=later, write={spliced: change})[1]

    clean, slope = jax.jvp(at_later, (jnp.float32(1),), (jnp.float32(1),))
    ablated = at_later(jnp.float32(0))
    found = {of: (clean[of], slope[of], ablated[of]) for of in later}
    seen = sharding.constrain(gemma.mesh, (f_SxL, is_kept_SxL), sharding.REPLICATED)
    return seen, sharding.constrain(gemma.mesh, found, sharding.TOKENS)


@functools.partial(jax.jit, static_argnames="mesh")
def _sums(
    mesh: jax.sharding.Mesh,
    subject: jumprelu.SAE,
    is_kept_SxL: jax.Array,
    clean_SxLxD: jax.Array,
    slope_SxLxD: jax.Array,
    ablated_SxLxD: jax.Array,
) -> dict[str, jax.Array]:
    """Sums [M] over the counted positions for a later SAE's latents."""
    highest = jax.lax.Precision.HIGHEST
    clean_BxD, slope_BxD, ablated_BxD = (
        value.reshape(is_kept_SxL.size, -1).astype(jnp.float32)
        for value in (clean_SxLxD, slope_SxLxD, ablated_SxLxD)
    )
    is_kept_Bx1 = is_kept_SxL.reshape(-1, 1)
    f_BxM = jumprelu.encode(subject, clean_BxD)
    slope_BxM = jnp.where(f_BxM > 0, jnp.matmul(slope_BxD, subject.W_enc, precision=highest), 0)
    difference_BxM = f_BxM - jumprelu.encode(subject, ablated_BxD)
    found = {
        "attribution_M": jnp.where(is_kept_Bx1, slope_BxM, 0).sum(0),
        "effect_M": jnp.where(is_kept_Bx1, difference_BxM, 0).sum(0),
        "fired_M": ((f_BxM > 0) & is_kept_Bx1).sum(0),
        "f_M": jnp.where(is_kept_Bx1, f_BxM, 0).sum(0),
    }
    return sharding.constrain(mesh, found, sharding.REPLICATED)


def virtual_weights(
    scope: Scope, subject: attached.Subject, latent: int, later: attached.Subject
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """W_dec[latent] · W_enc of a later SAE and their cosine, both [M]; None where they do not meet in the stream.

    A decoder direction of `attn_out` is mapped through the output projection and the gain of the norm after it. For a
    later SAE on `mlp_in`, the direction is multiplied by the gain of the MLP's norm. The norms' divisors are left
    out.
    """
    params = scope.gemma.params
    written = decoder_directions.in_stream(params, subject.spliced, np.asarray(subject.sae.W_dec)[[latent]])
    if written is None or later.site.kind in ("mlp_out", "attn_out"):
        return None, None
    written_D, gain_D = np.float64(written[0]), 1.0
    if later.site.kind == "mlp_in":
        gain_D = np.float64(distributed.fetch(forward.mlp_in_gain(params, later.site.layer)))
    weights, lengths = [], []
    for start in range(0, len(later.sae.b_enc), _BLOCK):
        reads_DxC = np.float64(np.asarray(later.sae.W_enc)[:, start : start + _BLOCK])
        weights.append((written_D * gain_D) @ reads_DxC)
        lengths.append(np.sqrt(np.square(np.ones_like(written_D) * gain_D) @ np.square(reads_DxC)))
    weight_M, length_M = np.concatenate(weights), np.concatenate(lengths)
    return weight_M, weight_M / np.maximum(length_M * np.linalg.norm(written_D), 1e-30)
