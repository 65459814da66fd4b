"""Shared parts of the figures: figures without pyplot's global state, token labels and heat maps."""

import io
import pathlib
import unicodedata
from collections.abc import Sequence

import matplotlib.axis
import matplotlib.backend_bases
import matplotlib.colors
import matplotlib.figure
import matplotlib.text
import matplotlib.ticker
import numpy as np

from gemma_scope_jax.display.glyphs import drawable, fallback_fonts, plottable
from gemma_scope_jax.runtime import files

LABEL = 40  # Maximum number of characters of a row label.


class Figure(matplotlib.figure.Figure):
    """A figure with room for its labels, whose text falls back to an installed font for Chinese and others."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def draw(self, renderer: matplotlib.backend_bases.RendererBase) -> None:
        """Draws the figure; notebooks and `png` both call this."""
        fallback = fallback_fonts()
        for text in self.findobj(matplotlib.text.Text) if fallback else ():
            family = [name for name in text.get_fontfamily() if name not in fallback]
            text.set_fontfamily([*family, *fallback])
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows for a cell that ends with the figure."""
        return png(self)


def new_figure(
    rows: int, columns: int, width: float, height: float, **options: object
) -> tuple[matplotlib.figure.Figure, np.ndarray]:
    """A figure and its axes [rows, columns]; `width` and `height` are the size of one panel in inches."""
    figure = Figure(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: matplotlib.figure.Figure, dpi: int = 100) -> bytes:
    """A figure as the bytes of a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def write_png(path: str | pathlib.Path, figure: matplotlib.figure.Figure, dpi: int = 100) -> None:
    """Writes a figure as a PNG."""
    with files.replacing_file(files.expanded(path)) as partial:
        partial.write_bytes(png(figure, dpi))


def columns_in(inches: float, points: float) -> int:
    """The number of characters of a size that fit a width; in sentences, one is 0.48 of its size wide on average."""
    return max(int(inches * 72 / (0.52 * points)), 20)


def log_ticks(of: matplotlib.axis.Axis, low: float, high: float) -> None:
    """Places the ticks of a logarithmic axis from `low` to `high`: several within a decade, one each over many."""
    if high > 1000 * low:
        of.set_major_locator(matplotlib.ticker.LogLocator(numticks=10))
    elif high > 4 * low:
        of.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    else:  # A log scale would have a tick or none.
        of.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=(1, 2, 5, 10)))
    of.set_minor_locator(matplotlib.ticker.NullLocator())
    of.set_major_formatter("{x:g}")


def seen(text: str) -> str:
    """A token's text with visible symbols for spaces, line ends and tabs."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def text_width(text: str) -> int:
    """The width of a text in a monospaced font: wide characters, such as Chinese ones, take two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def label(text: str, most: int = 12, space: str = "·") -> str:
    """A token's text for a picture: as `seen`, with characters that no font has escaped.

    It is cut to `most` columns of `text_width`, except that the first character is always whole.
    """
    parts = [drawable(letter) for letter in seen(text[: most + 1]).replace("·", space)]
    if text_width("".join(parts)) <= most or len(parts) == 1:
        return "".join(parts)
    while text_width("".join(parts)) > most - 1 and len(parts) > 1:
        parts.pop()
    return "".join(parts) + "…"


def label_tokens(axis: object, tokens: Sequence[str], most: int = 80) -> None:
    """Labels the columns of a picture with tokens; skips tokens evenly so that there are at most `most` labels."""
    places = range(0, len(tokens), -(-len(tokens) // most))
    texts = [label(tokens[place]) for place in places]
    # A dollar sign in a token must not start a formula.
    axis.set_xticks(list(places), texts, rotation=90, fontsize=7, parse_math=False)
    axis.set_xlabel("token", fontsize=8)


def label_rows(axis: object, labels: Sequence[str]) -> None:
    """Labels the rows of a picture; long labels lose their middle, since names differ at either end."""
    half = LABEL // 2
    shown = [label if len(label) <= LABEL else f"{label[:half]}…{label[1 - half :]}" for label in labels]
    axis.set_yticks(range(len(labels)), [plottable(label) for label in shown], fontsize=7)


def heat_map(
    figure: matplotlib.figure.Figure, axis: object, values: np.ndarray, scale: str, title: str
) -> None:
    """Draws values [rows, tokens] as colours, with the first row at the bottom and NaN in grey.

    The colour scale ends at the 98th percentile, so that a few outliers do not compress it. The colour bar has a
    pointed end on each side where values lie outside the scale.

    Args:
      figure: the figure that has the axis.
      axis: the axis to draw on.
      values: the values to draw.
      scale: `linear` (starts at 0), `log` (starts at the 2nd percentile) or `signed` (symmetric around 0).
      title: the title above the picture.
    """
    known = values[np.isfinite(values)]
    known = known if known.size else np.zeros(1)
    colours = {"linear": "viridis", "log": "viridis", "signed": "RdBu_r"}[scale]
    # The percentile of the nonzero values only, since most values can be 0.
    high = max(float(np.percentile(np.abs(known[known != 0]), 98)) if known.any() else 0.0, 1e-6)
    if scale == "log":
        low = max(float(np.percentile(known, 2)), 1e-6)
        norm = matplotlib.colors.LogNorm(low, max(high, 1.01 * low))
    else:
        norm = matplotlib.colors.Normalize(-high if scale == "signed" else 0, high)
    image = axis.imshow(
        values, aspect="auto", origin="lower", interpolation="nearest", cmap=colours, norm=norm
    )
    axis.set_facecolor("#dddddd")
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = beyond[bool(known.min() < norm.vmin), bool(known.max() > norm.vmax)]
    bar = figure.colorbar(image, ax=axis, extend=extend, pad=0.01).ax
    if scale == "log":
        log_ticks(bar.yaxis, norm.vmin, norm.vmax)
    bar.tick_params(labelsize=7)
    # The rest of the width is for the labels of the rows and the colour bar.
    width = figure.get_figwidth() / axis.get_gridspec().ncols - 0.9
    axis.set_title(plottable(title, 100, columns_in(width, 9)), fontsize=9)
