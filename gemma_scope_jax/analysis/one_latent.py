"""One latent in detail: what it fires on and which tokens it raises. Dashboards show the same for all latents."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

import matplotlib.figure
import matplotlib.patches
import numpy as np
import rich.color
import rich.console
import rich.style
import rich.table
import rich.text

from gemma_scope_jax.analysis import decoder_directions
from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.data import batching
from gemma_scope_jax.display import plotting, tables
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.display.results import Result, records_of
from gemma_scope_jax.models import tokenizer
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import lines, printable
from gemma_scope_jax.saes.attached import alone

_GREEN = (30, 142, 62)
# Text in pictures: its size in points, and the width of a character and height of a line in inches.
_POINTS, _CHARACTER, _LINE = 8, 0.0669, 0.19


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The passage around a firing."""

    tokens: tuple[str, ...]
    values: np.ndarray  # the latent's activation on each token
    peak: int  # index of the token of the firing


@dataclasses.dataclass(frozen=True)
class Look(Result):
    """What one latent fires on, and which tokens it raises and lowers."""

    model: str
    sae: str
    latent: int
    activations: int  # the number of positions measured
    frequency: float  # the share of positions on which the latent fires
    mean: float  # mean activation where it fires
    largest: float  # largest activation
    histogram_H: np.ndarray  # number of firings by activation; bins in `collect.EDGES`
    strongest: tuple[Excerpt, ...]
    sampled: tuple[Excerpt, ...]  # one firing from each fifth of a sample, the strongest fifth first
    # Tokens and their logits if the decoder direction alone were the residual stream; None if the SAE's output is not
    # added to the stream.
    raises: tuple[tuple[str, float], ...] | None
    lowers: tuple[tuple[str, float], ...] | None

    @property
    def title(self) -> str:
        """A title that says how often and how strongly the latent fires."""
        return (
            f"latent {self.latent} of {printable(self.sae, 100)}\n"
            f"fires on {self.frequency:.2%} of {self.activations:,} activations, "
            f"mean activation {self.mean:.4g}, maximum {self.largest:.4g}"
        )

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each token of each excerpt."""
        for kind, excerpts in (("strongest", self.strongest), ("sampled", self.sampled)):
            for number, excerpt in enumerate(excerpts):
                peak = np.arange(len(excerpt.tokens)) == excerpt.peak
                yield from records_of(
                    {
                        "kind": kind,
                        "excerpt": number,
                        "token": list(excerpt.tokens),
                        "activation": excerpt.values,
                        "is_peak": peak,
                    }
                )

    def show(self, top: int = 10) -> None:
        """Prints passages with tokens shaded by activation, and the tokens that the latent raises and lowers."""
        tables.show(self.title, "bold")
        for heading, excerpts in (
            ("strongest firings", self.strongest[:top]),
            ("one firing from each fifth of a sample", self.sampled),
        ):
            table = rich.table.Table(title=heading, title_justify="left", show_header=False, box=None)
            table.add_column(justify="right", style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for excerpt in excerpts:
                line = rich.text.Text()
                for token, value in zip(excerpt.tokens, excerpt.values, strict=True):
                    line.append(lines(token.replace("\n", "↵")), _style(value / self.largest))
                table.add_row(f"{excerpt.values[excerpt.peak]:.4g}", line)
            tables.show(table)
        for heading, tokens in (("raises", self.raises), ("lowers", self.lowers)):
            if tokens is not None:
                tables.show(f"{heading} {' '.join(repr(token) for token, _ in tokens)}")

    def figure(self, top: int = 8, width: int = 110) -> matplotlib.figure.Figure:
        """The strongest passages, with darker tokens where the latent fires more; raised tokens; and a histogram.

        Args:
          top: the number of passages.
          width: the width of a passage in characters.
        """
        shown = self.strongest[:top]
        inches = _CHARACTER * width
        height = _LINE * (len(shown) + 1)
        figure = plotting.Figure(inches + 0.7, height + 2)
        above, below = figure.subplots(2, 1, height_ratios=(height, 0.8))
        columns = plotting.columns_in(inches + 0.7, 9)
        title = "\n".join(plottable(line, 200, columns) for line in self.title.split("\n"))
        figure.suptitle(title, fontsize=9)
        above.set_xlim(0, width)
        above.set_ylim(len(shown), 0)
        above.set_axis_off()
        for line, excerpt in enumerate(shown):
            self._draw(above, line, excerpt, width)
        if self.raises:
            raised = " ".join(plotting.label(token, 20) for token, _ in self.raises)
            raised = textwrap.wrap(f"raises the logits of {raised}", plotting.columns_in(inches, 8))
            below.set_title("\n".join(raised), fontsize=8, loc="left", parse_math=False)
        edges = collect.EDGES
        below.stairs(self.histogram_H, edges, fill=True, color=np.array(_GREEN) / 255)
        fires = np.flatnonzero(self.histogram_H)
        below.set_xscale("log")
        ends = edges[fires[0]], edges[fires[-1] + 1]
        below.set_xlim(ends)
        plotting.log_ticks(below.xaxis, *ends)
        below.tick_params(labelsize=7)
        below.set_xlabel("activation", fontsize=8)
        below.set_ylabel("firings", fontsize=8)
        return figure

    def _draw(self, axis: object, line: int, excerpt: Excerpt, width: int) -> None:
        """Draws a passage on one line, with peaks aligned in a column; tokens that do not fit are left out."""
        texts = [plotting.label(token, 40, " ") for token in excerpt.tokens]
        peak_at = int(0.62 * width)
        widths = np.array([plotting.text_width(text) for text in texts])
        starts = np.cumsum(widths) - widths
        shift = peak_at - starts[excerpt.peak]
        style = {"fontsize": _POINTS, "family": "DejaVu Sans Mono", "va": "center", "ha": "center"}
        style |= {"parse_math": False, "in_layout": False}
        for text, columns, start, value in zip(texts, widths, starts + shift, excerpt.values, strict=True):
            if start < 6 or start + columns > width:
                continue
            if value > 0:
                colour = (*(np.array(_GREEN) / 255), 0.1 + 0.7 * min(value / self.largest, 1))
                corner = (start, line + 0.08)
                axis.add_patch(matplotlib.patches.Rectangle(corner, columns, 0.84, color=colour, lw=0))
            for character in text:  # Drawn one by one so that each is in its own column.
                room = plotting.text_width(character)
                axis.text(start + room / 2, line + 0.5, character, **style)
                start += room
        value = f"{excerpt.values[excerpt.peak]:.4g}"
        axis.text(5, line + 0.5, value, fontsize=7, va="center", ha="right", color="#5f6368")


def _style(share: float) -> rich.style.Style:
    if share <= 0:
        return rich.style.Style()
    weight = 0.15 + 0.85 * min(share, 1)
    colour = (round(255 + weight * (part - 255)) for part in _GREEN)
    return rich.style.Style(color="black", bgcolor=rich.color.Color.from_rgb(*colour))


def look_at(scope: Scope, name: str, latent: int, rows: int = 64, top: int = 20) -> Look:
    """Measures what a latent fires on in held-out text, and which tokens it raises.

    Args:
      scope: the model and its SAEs.
      name: the name of the latent's SAE.
      latent: the number of the latent.
      rows: how many held-out rows to read, in the order of an evaluation; at most all of them.
      top: the number of passages around the strongest firings.

    Returns:
      The passages, the histogram, and the raised and lowered tokens.

    Raises:
      ValueError: if there is no such SAE or latent, `rows` is less than 1, or the latent never fires.
    """
    scope.check_latent(name, latent)
    ranges.check("rows", rows, ranges.COUNT)
    subject = alone(scope.subjects[name], [latent])
    held_out = scope.held_out()
    gathered = collect.gather(
        scope.gemma, {name: subject}, held_out, rows, scope.config.evaluation.rows_per_batch,
        batching.counts_of(scope.config), collect.Options(top=top),
    )[name]  # fmt: skip
    if not gathered.count_M[0]:
        raise InputError(
            f"latent {latent} of {name} never fires on {gathered.rows} held-out rows; read more rows"
        )
    cut = collect.Passages(collect.read_tokens(held_out, rows))
    text_of = tokenizer.token_texts(scope.tokenizer.decode)

    def excerpts(firings: collect.Firings, indices: Sequence[int]) -> tuple[Excerpt, ...]:
        found = [cut(gathered.options, firings, 0, int(index)) for index in indices]
        return tuple(Excerpt(tuple(map(text_of, one.tokens.tolist())), one.values, one.peak) for one in found)

    raises = lowers = None
    in_stream = decoder_directions.in_stream(scope.gemma.params, subject.spliced, subject.sae.W_dec)
    if in_stream is not None:
        up_T, raised_T, down_T, lowered_T = (
            part[0].tolist() for part in decoder_directions.logits(scope.gemma, in_stream)
        )
        raises = tuple(zip(map(text_of, up_T), raised_T, strict=True))
        lowers = tuple(zip(map(text_of, down_T), lowered_T, strict=True))
    return Look(
        scope.config.model,
        name,
        latent,
        gathered.activations,
        float(gathered.frequency_M[0]),
        float(gathered.mean_M[0]),
        float(gathered.max_M[0]),
        gathered.histogram_MxH[0],
        excerpts(gathered.top, np.flatnonzero(gathered.top.row_MxK[0] >= 0)),
        excerpts(gathered.sample, [band[0] for band in collect.bands(gathered, 0)]),
        raises,
        lowers,
    )
