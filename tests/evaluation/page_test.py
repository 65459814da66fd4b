"""The page of an evaluation, as text and in a browser, and its table for spreadsheets."""

import csv
import pathlib
import re
from html import unescape

import browser
import matplotlib.image
import pytest
from random_evaluations import ABOUT, evaluation

from gemma_scope_jax.evaluation import metrics, page
from gemma_scope_jax.saes import verdicts


@pytest.fixture
def written(tmp_path):
    results = {f"layer_{i}_resid_post": evaluation(i) for i in (0, 1)}
    layers = {name: i for i, name in enumerate(results)}
    verdicts_of = {name: verdicts.Verdict(("<b>bad</b>",) * i, "wait") for i, name in enumerate(results)}
    command = "gemma-scope evaluate X --rows=4"
    page.write_html(tmp_path / "a.html", results, ABOUT, command, layers, None, verdicts_of, ["<u>"])
    return tmp_path / "a.html", results


def cells(html):
    """The cells of the table, by SAE and metric."""
    found = {}
    for name, row in re.findall(r'<tr data-name="([^"]+)">(.*?)</tr>', html, re.DOTALL):
        found.setdefault(name, {}).update(re.findall(r'data-number="(\w+)">([^<]+)<', row))
    return found


def check(html, results):
    found = cells(html)
    assert list(found) == list(results)
    for name, result in results.items():
        assert found[name]["l0"] == f"{result.l0:.1f} ± {result.l0_se:.1f}"
        assert found[name]["delta_loss"] == f"{result.delta_loss:.4f} ± {result.delta_loss_se:.4f}"
        assert found[name]["kl"] == "–"


def test_the_page_holds_every_number_and_needs_no_network(written):
    path, results = written
    html = path.read_text()
    check(html, results)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert html.count("data:image/png;base64,") == 3  # One picture for each SAE, and one by layer.
    assert "not the training text, <code>&lt;i&gt;</code>" in html and "&lt;u&gt;" in html
    verdict = re.search('<ul id="verdict">(.*?)</ul>', html, re.DOTALL)[1]
    assert "No faults in 1 of 2 SAEs" in verdict and "layer_0" not in verdict
    assert "&lt;b&gt;bad&lt;/b&gt;. Next: wait." in verdict
    assert "&lt;sotu &amp; co&gt;" in html and "gemma-scope evaluate X --rows=4" in html
    shown = set(map(unescape, re.findall(r"<d[td]>(.*?)</d[td]>", html, re.DOTALL)))
    for metric in metrics.METRICS.values():
        assert {metric.label, metric.definition} <= shown


def test_the_main_metrics_come_first_each_with_its_reading(written):
    html = written[0].read_text()
    first = re.search('<table class="numbers">(.*?)</table>', html, re.DOTALL)[1]
    main = ["l0", "delta_loss", "loss_recovered_mean", "dead_fraction", "dense_fraction"]
    assert re.findall(r'data-number="(\w+)"', first) == 2 * main
    lines = re.findall(
        "<li><b>(.*?)</b>: (.*?)</li>", re.search('<ul id="readings">(.*?)</ul>', html, re.S)[1]
    )
    assert lines == [(metrics.METRICS[name].label, metrics.METRICS[name].reading) for name in main]


LONG = "layer_12_resid_post_width_16k_average_l0_" + 3 * "0123456789"


@browser.needs_chromium
def test_the_page_does_not_scroll_sideways_and_its_summary_fits(tmp_path):
    results = {f"{LONG}{i}": evaluation(i) for i in range(2)}
    about = ABOUT | {"text": 20 * "/long_folder"}
    page.write_html(tmp_path / "a.html", results, about, 40 * "--option=", dict.fromkeys(results, 1))
    assert browser.beyond(tmp_path / "a.html") == 0
    beyond = "(box => box.scrollWidth - box.clientWidth)(document.querySelector('.wide'))"
    assert browser.measure(tmp_path / "a.html", beyond, 1280) == 0
    assert browser.measure(tmp_path / "a.html", beyond, 400) > 0  # The table scrolls in its box instead.


@browser.needs_chromium
def test_a_browser_shows_the_measurements(written):
    path, results = written
    check(browser.dump(path), results)
    picture = path.with_name("shot.png")
    browser.screenshot(path, picture)
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (1000, 1400)
    assert pixels[..., :3].std() > 0.05  # Not a blank page.


def test_the_table_for_spreadsheets_has_a_column_for_each_number(tmp_path):
    results = {"a": evaluation(0), "b": evaluation(1)}
    page.write_csv(tmp_path / "a.csv", results)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert float(rows[1]["fvu_se"]) == results["b"].fvu_se and rows[0]["kl"] == ""
    assert rows[0]["l0_quantiles"] == "1 2 3 4 5"
    assert "frequency" not in rows[0]


def test_every_metric_is_defined_in_the_documentation():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for metric in metrics.METRICS.values():
        first = metric.label.split(",")[0]
        assert first in text or first in ("clean loss", "spliced loss", "zero ablation", "mean ablation"), (
            metric
        )
