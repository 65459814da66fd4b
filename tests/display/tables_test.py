"""Every table, figure and page with hostile names: each name is shown, and none is interpreted."""

import csv
import re
import types
import unicodedata

import matplotlib.figure
import numpy as np
import pytest
from random_evaluations import ABOUT, evaluation

from gemma_scope_jax.analysis import one_latent, prompt_activations
from gemma_scope_jax.analysis.attribution import ablation, gradients
from gemma_scope_jax.analysis.contrasts import correction, find
from gemma_scope_jax.analysis.dashboards import collect, website
from gemma_scope_jax.analysis.layers import flow as flow_lib
from gemma_scope_jax.analysis.layers import links, logit_lens
from gemma_scope_jax.analysis.steering import edits, steer
from gemma_scope_jax.analysis.steering import sweep as sweep_lib
from gemma_scope_jax.display import plotting
from gemma_scope_jax.display.glyphs import plottable
from gemma_scope_jax.evaluation import detection, page, plots, probing, report, side_by_side
from gemma_scope_jax.runtime.printing import well_formed

NAMES = (
    "a$b_$", "$x", "[bold]x", "[/]", ":smile:", "_hidden", "a\x1b[2J\x1b]0;title\x07b", "two\nlines\r", "🙂🏽",
    "\u202eabc\u2066", "half\ud800", "</script><img src=x onerror=alert(1)>", "x" * 10_000, "日本 עברית",
)  # fmt: skip
NASTIEST = (NAMES[0], NAMES[6], "x" * 10_000)  # For figures, which are slow to draw.
TOKENS = (" a$b", "\x1b[2J", "\n", "_x", "[bold]", "\ud800", "🙂")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def by_name(make):
    return {name: make() for name in NAMES}


def line(*shape):
    return by_name(lambda: RNG.random(shape))


def check_printed(capsys, *expected):
    """Checks that the output has only text in short lines, and holds the expected texts."""
    shown = capsys.readouterr().out
    assert shown and not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown if c != "\n")
    assert max(map(len, shown.split("\n"))) < 1000
    for text in expected:
        assert text in shown, text


def draw(figure: matplotlib.figure.Figure) -> matplotlib.figure.Figure:
    assert plotting.png(figure, 30)
    return figure


def check_page(path, is_of_names=True):
    """Checks that all markup is the template's, and that no name fills the page."""
    html = path.read_text(encoding="utf-8")
    assert "<img src=x" not in html and len(re.sub(r'src="data:[^"]*"', "", html)) < 200_000
    assert not any(unicodedata.category(c) == "Cc" for c in html if c not in "\n\t")
    assert not is_of_names or ("\u202e" not in html and "[bold]x" in html)


def test_evaluations(tmp_path, capsys, monkeypatch):
    # The details show no name, and are slow to draw.
    monkeypatch.setattr(plots, "details", lambda result: plotting.new_figure(1, 1, 1, 1)[0])
    results = by_name(evaluation)
    report.print_table(results, NAMES[6])
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", ":smile:", r"a\x1b[2J", r"two\nlines\r")
    for name in NAMES:
        report.print_table({name: results[name]}, "text")
    check_printed(capsys, "[bold]x", r"\u202eabc")
    few = {name: results[name] for name in NASTIEST}
    plotting.write_png(tmp_path / "a.png", plots.frequencies(few))
    plotting.write_png(
        tmp_path / "b.png", plots.pareto(few, {name: {name: name, "a$b_$": name} for name in few})
    )
    assert plots.by_layer(results, {name: number for number, name in enumerate(NAMES)})
    about = ABOUT | {"text": NAMES[6], "model": NAMES[11]}
    page.write_html(tmp_path / "a.html", results, about, " ".join(NAMES[:12]), dict.fromkeys(results, 1))
    check_page(tmp_path / "a.html")
    page.write_json(tmp_path / "a.json", results, about, {})
    results = {well_formed(name): result for name, result in results.items()}  # As `opening` names them.
    page.write_csv(tmp_path / "a.csv", results)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(results)
    page.write_arrays(tmp_path / "a.npz", results)
    with np.load(tmp_path / "a.npz") as arrays:
        assert {name.rpartition("/threshold")[0] for name in arrays if name.endswith("/threshold")} == set(
            results
        )


def test_legends_show_every_name():
    shown = plots.side_by_side({name: {"sae": evaluation()} for name in NAMES})
    (legend,) = (axis.get_legend() for axis in shown.axes if axis.get_legend())
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(NAMES) and " _hidden" in texts and r"a\$b_\$" in texts
    draw(shown)


def test_side_by_side(tmp_path, capsys):
    columns = {name: side_by_side.Suite({"text": name}, by_name(evaluation)) for name in NAMES[:8]}
    made = side_by_side.comparison(columns)
    made.save(tmp_path, "command")
    made.show()
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"\u202eabc")
    check_page(tmp_path / "side_by_side.html")


def test_probes_and_detections(capsys):
    probe = probing.Probe((), np.ones(4))
    few = dict.fromkeys(probing.FEATURES, probe)
    tasks = [probing.Task(name, probe, few, few, probe) for name in NAMES]
    for results in (by_name(lambda: tasks), {"[bold]x": tasks}):
        probing.print_table(results, 9)
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"\u202eabc")
    latent = detection.Latent(1, 0.1, 0.9, 0.9, 0.5, {"on": TOKENS, "before": TOKENS})
    found = detection.Detection(*[0.5] * 7, (latent,))
    for results in (by_name(lambda: found), {NAMES[6]: found, "[bold]x": found}):
        detection.print_tables(results, 9)
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"'\x1b[2J'", "' a$b'")


def test_reading_and_flow(tmp_path, capsys):
    length = len(TOKENS)
    found = prompt_activations.Reading(
        NAMES[6], TOKENS, by_name(lambda: np.diag(RNG.random(length))), line(length), {}
    )
    found.show()
    check_printed(capsys, "[bold]x", r"\x1b[2J", "'[bold]'")
    for name in NASTIEST:
        draw(found.figure(name))
    found.write_html(tmp_path / "a.html")
    check_page(tmp_path / "a.html")

    ids = np.arange(length)
    seen = [
        logit_lens.Predictions(np.tile(ids, (r, 1)), *RNG.random((2, r, length)), np.ones((r, length), int))
        for r in (2, 2, 1)
    ]
    texts = dict(enumerate(TOKENS))
    through = logit_lens.Lens(TOKENS, NAMES[:2], ids, True, *seen, texts)
    values = RNG.random((4, len(NAMES), length))
    flow = flow_lib.Flow(
        NAMES[6], TOKENS, NAMES, ("resid_post",) * len(NAMES), (1,) * len(NAMES), *values, through
    )
    flow.show()
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"a\x1b[2J", r"'\x1b[2J'")
    draw(flow.figure())
    draw(through.figure())
    flow.write_html(tmp_path / "b.html")
    check_page(tmp_path / "b.html")


def test_attribution_and_ablations(tmp_path, capsys):
    length = len(TOKENS)

    def parts():
        token_N, latent_N = RNG.integers(length, size=9), RNG.integers(5, size=9)
        return gradients.Parts(token_N, latent_N, *RNG.random((2, 9)), 5, *RNG.random((4, length)))

    found = gradients.Attribution(
        NAMES[6], TOKENS, (2, *range(length)), (1, "$a$"), (2, "\x1b"), 0.5, by_name(parts)
    )
    found.show()
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"'\x1b'")
    draw(found.figure())
    found.write_html(tmp_path / "a.html")
    check_page(tmp_path / "a.html")
    count = len(NAMES)
    numbers = [RNG.integers(3, size=count) for _ in range(3)]
    made = ablation.Ablations(NAMES, *numbers, RNG.random(count) < 0.5, *RNG.random((2, count)))
    made.show(99)
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"a\x1b[2J")
    draw(made.figure())


def test_contrast_and_correction(capsys):
    def latents():
        return find.Latents(*RNG.random((2, 4)), np.full(4, 0.001), *RNG.random((5, 4)))

    found = find.Contrast("m", NAMES, NAMES, "mean", 0.05, False, 0.001, by_name(latents))
    found.show()
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"a\x1b[2J")
    draw(found.figure(99))
    outcome = correction.Outcome(RNG.random(3), RNG.random(3), 1.0)
    for answer in NAMES:
        corrected = correction.Correction(
            answer, "$x$", False, ((answer, 1),), outcome, outcome, (outcome,) * 2
        )
        corrected.show()
    check_printed(capsys, "'[bold]x'", r"a\x1b[2J")
    draw(corrected.figure())


def test_links_looks_and_sweeps(capsys):
    weights = (line(4), line(4), line(4), line(4), line(4))
    for name in NAMES:
        found = links.Links(
            name, 1, 9, 9, 0.5, *weights, by_name(lambda: 1.0), {n: i for i, n in enumerate(NAMES)}
        )
        found.show()
    check_printed(capsys, "[bold]x", "_hidden", "a$b_$", r"a\x1b[2J", "x" * 50)
    draw(found.figure())

    excerpt = one_latent.Excerpt(TOKENS, RNG.random(len(TOKENS)), 2)
    histogram = np.ones(len(collect.EDGES) - 1, int)
    told = tuple((token, 0.5) for token in TOKENS)
    four = np.array([-1.0, 0, 1, 2])
    for name in NAMES:
        look = one_latent.Look("m", name, 1, 9, 0.1, 0.5, 1.0, histogram, (excerpt,), (excerpt,), told, told)
        look.show()
        sweep = sweep_lib.Sweep(name, 1, "add", 1.0, TOKENS, four, *RNG.random((4, 4)), 3.0, 2, 9)
        sweep.show()
        for figure in (look.figure(), sweep.figure()) if name in NASTIEST else ():
            draw(figure)
    check_printed(capsys, "of [bold]x", "of _hidden", "of a$b_$", r"a\x1b[2J", r"'\x1b[2J'")


def test_steered_texts_and_links_of_dashboards(tmp_path, capsys):
    changes = tuple(edits.ablate(name, 1) for name in NAMES)
    replies = (tuple("".join(TOKENS) for _ in range(2)),) * len(NAMES)
    steered = steer.Steered(NAMES[6], changes, NAMES, replies, replies)
    steered.show()
    check_printed(capsys, "[bold]x", r"a\x1b[2J", ":smile:")
    steered.write_html(tmp_path / "a.html")
    check_page(tmp_path / "a.html", is_of_names=False)
    gathered = types.SimpleNamespace(
        activations=9,
        l0=1.0,
        is_dead_M=np.zeros(4, bool),
        is_dense_M=np.zeros(4, bool),
        count_M=np.ones(4),
        frequency_M=np.ones(4),
    )
    shown = {
        name: website.Dashboards(name, "m", None, name, gathered, None, None, None, None) for name in NAMES
    }
    website.write_links(tmp_path / "b.html", {name: f"f{i}" for i, name in enumerate(NAMES)}, shown)
    check_page(tmp_path / "b.html")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_figure_is_text(name):
    figure = matplotlib.figure.Figure(figsize=(2, 2))
    axis = figure.subplots()
    axis.plot([1], label=plottable(name))
    axis.set_title(plottable(name))
    assert len(axis.get_legend_handles_labels()[1]) == 1
    draw(figure)
