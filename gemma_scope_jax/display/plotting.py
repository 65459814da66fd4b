"""Shared parts of the figures: figures without pyplot's global state, token labels and heat maps."""

import io
import pathlib
from collections.abc import Sequence

import matplotlib.colors
import matplotlib.figure
import numpy as np

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.printing import has_glyph, plottable

LABEL = 40  # Maximum number of characters of a row label.


def new_figure(
    rows: int, columns: int, width: float, height: float, **options: object
) -> tuple[matplotlib.figure.Figure, np.ndarray]:
    """A figure and its axes [rows, columns]; `width` and `height` are the size of one panel in inches."""
    size = (width * columns, height * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
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


def seen(text: str) -> str:
    """A token's text with visible symbols for spaces, line ends and tabs."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def label(text: str, most: int = 12, space: str = "·") -> str:
    """A token's text for a picture: as `seen`, cut to `most` characters, with a box for glyphs the font lacks."""
    shown = seen(text).replace("·", space)
    cut = shown if len(shown) <= most else shown[: most - 1] + "…"
    return "".join(c if c.isprintable() and has_glyph(c) else "□" for c in cut)


def label_tokens(axis: object, tokens: Sequence[str], most: int = 80) -> None:
    """Labels the columns of a picture with tokens; skips tokens evenly so that there are at most `most` labels."""
    places = range(0, len(tokens), -(-len(tokens) // most))
    texts = [label(tokens[place]) for place in places]
    # A dollar sign in a token must not start a formula.
    axis.set_xticks(list(places), texts, rotation=90, fontsize=7, parse_math=False)


def label_rows(axis: object, labels: Sequence[str]) -> None:
    """Labels the rows of a picture."""
    axis.set_yticks(range(len(labels)), [plottable(label, LABEL) for label in labels], fontsize=7)


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
    figure.colorbar(image, ax=axis, extend=extend, pad=0.01).ax.tick_params(labelsize=7)
    axis.set_title(plottable(title, 100), fontsize=9)
