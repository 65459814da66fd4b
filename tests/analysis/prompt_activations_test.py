"""Activations on a prompt, compared with slow NumPy, in the terminal and in a browser."""

import dataclasses
import json
import re

import browser
import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached

SITES = {"first": Site("resid_post", 0), "<b>second</b>": Site("mlp_out", 2)}
TEXT = "law & <i>bread</i>"


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    subjects = {
        name: attached.Subject(random_sae(seed), site, None)
        for seed, (name, site) in enumerate(SITES.items())
    }
    frequency = {"first": np.where(np.arange(64) % 4 == 0, 0.5, 0.01)}
    return scopes.make(tiny_gemma, subjects, frequency=frequency)


@pytest.fixture(scope="module")
def reading(scope):
    return analysis.read(scope, TEXT)


def test_latents_and_errors_equal_slow_numpy(scope, reading, tiny_gemma):
    tokens = jnp.array([[masking.BOS, *tiny.encode(TEXT)]])
    values = forward.read_sites(tiny_gemma, tokens, list(SITES.values()))
    assert "".join(reading.tokens) == TEXT
    for name, site in SITES.items():
        subject = scope.subjects[name].sae
        y = np.asarray(values[site], np.float64)[0, 1:]
        pre = y @ np.float64(subject.W_enc) + subject.b_enc
        f = np.where(pre > subject.threshold, np.maximum(pre, 0), 0)
        np.testing.assert_allclose(reading.latents[name], f, rtol=1e-3, atol=1e-4)
        error = np.linalg.norm(f @ np.float64(subject.W_dec) + subject.b_dec - y, axis=1) / np.linalg.norm(
            y, axis=1
        )
        np.testing.assert_allclose(reading.error[name], error, rtol=1e-4)


def test_the_strongest_latents_come_first_and_dense_latents_are_left_out(reading):
    f = reading.latents["first"][3]
    rare = [i for i in np.argsort(-f) if i % 4 and f[i] > 0]
    assert [latent for latent, _ in reading.strongest("first", 3, 4)] == rare[:4]
    assert [value for _, value in reading.strongest("first", 3, 4)] == [float(f[i]) for i in rare[:4]]
    # Without known frequencies, latents that fire on more than half of the prompt count as dense.
    other = reading.latents["<b>second</b>"]
    np.testing.assert_array_equal(reading.is_dense("<b>second</b>"), (other > 0).mean(0) > 0.5)


def test_the_terminal_shows_each_token(reading, capsys):
    reading.show(top=2)
    shown = capsys.readouterr().out
    best, value = reading.strongest("first", 0, 1)[0]
    assert re.search(rf"'l' .* {best}:{value:.3g} ", shown), shown
    assert shown.count("'b'") >= 2


def test_the_figure_sorts_the_strongest_latents_by_the_position_of_their_peak(reading):
    figure = reading.figure("first", top=6)
    axis = figure.axes[0]
    latents = [int(label.get_text()) for label in axis.get_yticklabels()]
    f_LxM = np.where(reading.is_dense("first")[None], 0, reading.latents["first"])
    assert set(latents) == set(np.argsort(-f_LxM.max(0))[:6].tolist())
    np.testing.assert_array_equal(axis.images[0].get_array(), f_LxM[:, latents].T)
    peaks = f_LxM[:, latents].argmax(0)  # The rows go from the bottom up.
    assert (np.diff(peaks) <= 0).all()
    assert "first" in axis.get_title()
    assert reading.figure().axes[0].get_title() == f"{next(iter(reading.latents))}: activations by token"


def test_a_page_escapes_text_and_holds_the_firing_latents(reading, tmp_path):
    reading.write_html(tmp_path / "a.html", top=3)
    html = (tmp_path / "a.html").read_text()
    assert "<b>second" not in html and "&lt;b&gt;second&lt;/b&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    cells = json.loads(re.search(r"const tokens.*\nconst cells = (.*), largest", html)[1])
    assert [latent for latent, _ in cells[0][5]["latents"]] == [
        i for i, _ in reading.strongest("first", 5, 3)
    ]


def listed(html):
    """The latents in the table beside the grid."""
    table = re.search(r'<table id="latents">(.*?)</table>', html, re.DOTALL)[1]
    return [int(latent) for latent in re.findall(r"<tr><td>(\d+)</td>", table)]


@browser.needs_chromium
def test_a_browser_lists_the_latents_of_the_first_token_and_of_a_clicked_token(reading, tmp_path):
    reading.write_html(tmp_path / "a.html", top=3)
    shown = browser.dump(tmp_path / "a.html")
    assert '<h2 id="chosen">first on "l"</h2>' in shown
    assert listed(shown) == [latent for latent, _ in reading.strongest("first", 0, 3)]
    name = list(reading.latents)[1]
    shown = browser.dump(tmp_path / "a.html", then=browser.click('[data-sae="1"][data-token="2"]'))
    assert re.search(r'<h2 id="chosen">&lt;b&gt;second&lt;/b&gt; on "', shown) and "<b>second" not in shown
    assert listed(shown) == [latent for latent, _ in reading.strongest(name, 2, 3)]


@browser.needs_chromium
def test_the_page_does_not_scroll_sideways(reading, tmp_path):
    renamed = {
        field: {f"{name}_{'long_name_' * 9}": value for name, value in getattr(reading, field).items()}
        for field in ("latents", "error")
    }
    dataclasses.replace(reading, **renamed).write_html(tmp_path / "a.html")
    assert browser.beyond(tmp_path / "a.html") == 0


def test_an_empty_text_is_refused(scope):
    with pytest.raises(ValueError, match="the text is empty"):
        analysis.read(scope, "")
