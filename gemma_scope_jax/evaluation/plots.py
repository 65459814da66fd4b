"""Plots of evaluations."""

from collections.abc import Mapping

import matplotlib.axes
import matplotlib.figure
import numpy as np

from gemma_scope_jax.display import plotting
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.saes.evaluation_file import Evaluation


def frequencies(results: Mapping[str, Evaluation]) -> matplotlib.figure.Figure:
    """A histogram of firing frequencies for each SAE, without latents that never fired."""
    columns = 1 if len(results) < 4 else 3
    figure, axes = plotting.new_figure(-(-len(results) // columns), columns, 7 if columns == 1 else 5, 3.2)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for (name, result), axis in zip(results.items(), axes.flat, strict=False):
        alive = result.frequency[result.frequency > 0]
        _histogram(axis, np.log10(alive), color="#1a73e8")
        axis.set_xlabel("log₁₀ firing frequency (share of activations)")
        axis.set_ylabel("number of latents")
        axis.set_title(
            f"{plottable(name)}\nL0 {result.l0:.1f}, FVU {result.fvu:.3f}, delta loss {result.delta_loss:.3f} ± "
            f"{result.delta_loss_se:.3f} nats, {result.dead_fraction:.1%} never fired",
            fontsize=10 if columns == 1 else 8,
        )
    return figure


def _histogram(
    axis: matplotlib.axes.Axes, values: np.ndarray, within: tuple[float, float] | None = None, **style: object
) -> None:
    """A histogram of 60 bins as one outline, which is drawn much faster than a bar for each bin."""
    axis.stairs(*np.histogram(values, 60, within), fill=True, **style)


def pareto(
    results: Mapping[str, Evaluation], sweeps: Mapping[str, Mapping[str, str]]
) -> matplotlib.figure.Figure:
    """Delta loss, FVU and r_L0 against L0, with a line through each sweep in the order given.

    Args:
      results: the evaluations by SAE.
      sweeps: for each line, by its label, the labels of its points by SAE.
    """
    lines = {
        label: [(results[name], text) for name, text in points.items()] for label, points in sweeps.items()
    }
    return _against_l0(lines)


def side_by_side(columns: Mapping[str, Mapping[str, Evaluation]]) -> matplotlib.figure.Figure:
    """Delta loss, FVU and r_L0 against L0, with a colour for each evaluation."""
    lines = {
        label: [(result, "") for result in sorted(results.values(), key=lambda r: r.l0)]
        for label, results in columns.items()
    }
    return _against_l0(lines, joined=False)


def _against_l0(
    lines: Mapping[str, list[tuple[Evaluation, str]]], joined: bool = True
) -> matplotlib.figure.Figure:
    """A panel for each metric, with the SAEs for which it was measured; each point is an SAE with its label."""
    everything = [result for points in lines.values() for result, _ in points]
    titles = {"delta_loss": "delta loss (nats)", "fvu": "FVU", "r_l0": "r_L0"}
    with_number = {name: [result for result in everything if _is_known(result, name)] for name in titles}
    numbers = [name for name, results in with_number.items() if results] or ["delta_loss"]
    figure, (axes,) = plotting.new_figure(1, len(numbers), 5.5, 4.2)
    for axis, number in zip(axes, numbers, strict=True):
        of_panel = with_number[number]
        for place, (label, points) in enumerate(lines.items()):
            known = [(result, text) for result, text in points if _is_known(result, number)]
            l0, y = ([getattr(result, name) for result, _ in known] for name in ("l0", number))
            error = [_finite(getattr(result, f"{number}_se")) for result, _ in known]
            style = {"marker": "o", "capsize": 3, "linestyle": "-" if joined else "none"}
            axis.errorbar(l0, y, error, label=plottable(label), color=f"C{place}", **style)
            for x, value, (_, text) in zip(l0, y, known, strict=True):
                axis.annotate(plottable(text), (x, value), (6, 6), textcoords="offset points", fontsize=7)
        # A delta loss can be negative and an L0 zero; then the scale stays linear.
        for scale, of, name in ((axis.set_xscale, axis.xaxis, "l0"), (axis.set_yscale, axis.yaxis, number)):
            values = [getattr(result, name) for result in of_panel]
            if values and min(values) > 0:
                scale("log")
                plotting.log_ticks(of, min(values), max(values))
            of.set_major_formatter("{x:g}")
        # Room for the points' labels, which begin at their points; a letter takes about a hundredth of the width.
        longest = max((len(plottable(text)) for points in lines.values() for _, text in points), default=0)
        axis.margins(x=0.05 + 0.02 * min(longest, 30), y=0.12)
        if missing := len(everything) - len(of_panel):
            name = titles[number].removesuffix(" (nats)")
            axis.set_title(f"without {missing} of {len(everything)} SAEs, which have no {name}", fontsize=8)
        axis.set_xlabel("L0 (latents per activation)")
        axis.set_ylabel(titles[number])
        axis.grid(alpha=0.3)
    if len(lines) > 1:
        axes[0].legend(fontsize=7)
    return figure


def _is_known(result: Evaluation, number: str) -> bool:
    return all(value is not None and np.isfinite(value) for value in (result.l0, getattr(result, number)))


def _finite(value: float | None) -> float:
    return value if value is not None and np.isfinite(value) else 0.0


def details(result: Evaluation) -> matplotlib.figure.Figure:
    """The distributions of one SAE's latents, its L0, and its errors by position."""
    figure, axes = plotting.new_figure(2, 4, 3.75, 2.8)
    (frequency, l0, error, delta), (threshold, decoder, encoder, cosine) = axes
    alive = result.frequency[result.frequency > 0]
    _histogram(frequency, np.log10(alive))
    frequency.set_xlabel("log₁₀ firing frequency (share of activations)")
    frequency.set_ylabel("latents")
    l0.stairs(result.l0_counts, np.arange(result.l0_counts.size + 1) - 0.5, fill=True)
    l0.set_xlabel("L0 (latents per activation)")
    l0.set_ylabel("activations")
    position = np.arange(len(result.by_position["error"]))
    for axis, name, label in (
        (error, "error", "squared error / variance"),
        (delta, "delta_loss", "delta loss (nats)"),
    ):
        values = result.by_position[name]
        axis.plot(position[1:], values[1:], lw=0.8)
        axis.set_xlabel("position after BOS (tokens)")
        axis.set_ylabel(label)
    for axis, values, label in (
        (threshold, result.threshold, "threshold"),
        (decoder, result.decoder_norm, "decoder norm"),
        (encoder, result.encoder_norm, "encoder norm"),
        (cosine, result.nearest_cosine, "cosine with the nearest decoder"),
    ):
        # Values that are equal up to rounding, such as decoder norms, get a single bar.
        low, high = float(values.min()), float(values.max())
        near = high - low < 1e-4 * max(abs(high), 1e-30)
        _histogram(
            axis, values, (low - 0.5 * abs(low) - 1e-3, high + 0.5 * abs(high) + 1e-3) if near else None
        )
        axis.set_xlabel(label)
        axis.set_ylabel("latents")
    for axis in axes.flat:
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
        axis.tick_params(labelsize=8)
    # Fixed margins: to find them from the labels takes as long as the drawing, and there is a figure for each SAE.
    figure.set_layout_engine(None)
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.09, top=0.98, wspace=0.3, hspace=0.28)
    return figure


def by_layer(results: Mapping[str, Evaluation], layers: Mapping[str, int]) -> matplotlib.figure.Figure:
    """L0, FVU and delta loss against the layer, with a line for each kind of SAE."""
    figure, ((l0, fvu, delta),) = plotting.new_figure(1, 3, 4.3, 3.6)
    # SAEs with the same name except for the layer share a line.
    lines: dict[str, list[str]] = {}
    for name in sorted(results, key=lambda name: layers[name]):
        lines.setdefault(name.replace(f"layer_{layers[name]}_", "", 1), []).append(name)
    for label, names in lines.items():
        x = [layers[name] for name in names]
        l0.plot(x, [results[name].l0 for name in names], marker="o", label=plottable(label))
        fvu.plot(x, [results[name].fvu for name in names], marker="o")
        of = [results[name] for name in names]
        delta.errorbar(x, [r.delta_loss for r in of], [r.delta_loss_se for r in of], marker="o", capsize=3)
    for axis, title in ((l0, "L0 (latents per activation)"), (fvu, "FVU"), (delta, "delta loss (nats)")):
        axis.set_xlabel("layer")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    if 1 < len(lines) <= 8:
        figure.legend(*l0.get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    return figure
