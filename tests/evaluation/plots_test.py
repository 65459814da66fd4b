"""Plots of evaluations."""

import dataclasses

import numpy as np
import pytest
from random_evaluations import evaluation

from gemma_scope_jax.evaluation import plots


def results(**changes):
    """Five SAEs on a curve; the values of the third are changed."""
    made = {
        f"sae{i}": dataclasses.replace(
            evaluation(i), l0=10.0 * 2**i, fvu=0.5 / 2**i, delta_loss=0.4 / 2**i, delta_loss_se=0.01, r_l0=0.3
        )
        for i in range(5)
    }
    return made | {"sae2": dataclasses.replace(made["sae2"], **changes)}


LABELS = {f"sae{i}": f"λ {0.0006 / 2**i:g}" for i in range(5)}


@pytest.mark.parametrize(("name", "value", "panel"), [("r_l0", None, 2), ("fvu", float("nan"), 1)])
def test_an_sae_without_a_metric_is_left_out_of_its_panel_only(name, value, panel):
    axes = plots.pareto(results(**{name: value}), {"a": LABELS}).axes
    assert [axis.get_ylabel() for axis in axes] == ["delta loss (nats)", "FVU", "r_L0"]
    drawn = [len(axis.lines[0].get_xdata()) for axis in axes]
    assert drawn == [4 if i == panel else 5 for i in range(3)]
    shown = axes[panel].get_title()
    assert "without 1 of 5 SAEs" in shown and sum(bool(axis.get_title()) for axis in axes) == 1
    fast = {name: dataclasses.replace(one, r_l0=None) for name, one in results().items()}
    assert len(plots.pareto(fast, {"a": LABELS}).axes) == 2


def test_lines_keep_their_colours_when_one_has_no_points():
    of = results()
    sweeps = {"a": {"sae2": "x"}, "b": {"sae3": "y"}}
    both, without = (plots.pareto(one, sweeps).axes[2].lines for one in (of, results(r_l0=None)))
    colour = {tuple(line.get_xdata()): line.get_color() for line in without}[of["sae3"].l0,]
    assert colour == {tuple(line.get_xdata()): line.get_color() for line in both}[of["sae3"].l0,]


def test_labels_of_points_stay_within_the_frame():
    figure = plots.pareto(results(), {"a": LABELS})
    figure.draw_without_rendering()
    for axis in figure.axes:
        frame = axis.get_window_extent()
        for text in axis.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1


def test_panels_by_layer_have_labels_and_a_legend_beside_them():
    figure = plots.by_layer(results(), {f"sae{i}": i for i in range(5)})
    figure.draw_without_rendering()
    assert [axis.get_xlabel() for axis in figure.axes] == 3 * ["layer"]
    assert all(axis.get_ylabel() for axis in figure.axes)
    (legend,) = figure.legends
    top = legend.get_window_extent().y1
    assert all(top <= axis.get_window_extent().y0 for axis in figure.axes)
    assert np.isfinite(top)
