"""Figures: text in other scripts, ticks and labels."""

import warnings

import matplotlib.figure
import numpy as np
import pytest
from IPython.core import formatters

from gemma_scope_jax.display import glyphs, plotting


@pytest.fixture
def with_stix(monkeypatch):
    """Replaces the font of Chinese characters by STIXGeneral, which comes with Matplotlib."""
    fonts = (glyphs.fallback_fonts, glyphs._fonts)
    monkeypatch.setattr(glyphs, "CJK_FONTS", ("STIXGeneral",))
    for of in fonts:
        of.cache_clear()
    yield
    monkeypatch.undo()
    for of in fonts:
        of.cache_clear()


def test_text_without_a_glyph_in_dejavu_is_drawn_in_an_installed_font(with_stix):
    figure, ((axis,),) = plotting.new_figure(1, 1, 3, 2)
    plotting.label_tokens(axis, ["\U0001d4d0"])
    axis.set_title("\U0001d4d0", family="DejaVu Sans Mono")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns of a missing glyph.
        plotting.png(figure)
    assert axis.title.get_fontfamily() == ["DejaVu Sans Mono", "STIXGeneral"]
    plotting.png(figure)
    assert axis.title.get_fontfamily() == ["DejaVu Sans Mono", "STIXGeneral"]


def test_wide_characters_take_two_columns():
    assert plotting.text_width("a語é") == 4


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(5.65, 6.15, 5), (1, 20, 5), (0.001, 1000, 7), (2.0**-10, 2.0**18, 9)],
)
def test_a_logarithmic_axis_has_a_handful_of_ticks_as_plain_numbers(low, high, expected):
    axis = matplotlib.figure.Figure().subplots()
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    plotting.log_ticks(axis.xaxis, low, high)
    axis.figure.draw_without_rendering()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert len(ticks) == expected and not len(axis.xaxis.get_minorticklocs())
    assert all("$" not in label.get_text() for label in axis.get_xticklabels())


def test_colour_bars_with_a_logarithmic_scale_have_plain_numbers():
    figure, ((axis,),) = plotting.new_figure(1, 1, 3.4, 2)
    plotting.heat_map(figure, axis, np.linspace(5.6, 6.2, 12).reshape(3, 4), "log", "x")
    figure.draw_without_rendering()
    texts = [label.get_text() for label in figure.axes[1].get_yticklabels(which="both")]
    assert 3 <= len(texts) <= 8 and all(float(text) for text in texts)


def test_long_labels_of_rows_lose_their_middle():
    axis = matplotlib.figure.Figure().subplots()
    plotting.label_rows(axis, ["short", "layer_12_resid_post_width_16k_average_l0_38_seed_1"])
    short, long = (label.get_text() for label in axis.get_yticklabels())
    assert short == "short" and len(long) == plotting.LABEL
    assert long.startswith("layer_12") and long.endswith("seed_1")


def test_a_notebook_shows_a_figure_as_a_picture():
    figure, _ = plotting.new_figure(1, 1, 2, 2)
    formatted, _ = formatters.DisplayFormatter().format(figure)
    assert formatted["image/png"].startswith(b"\x89PNG")
