"""A prompt through the layers, compared with slow NumPy and with Gemma with a site replaced."""

import dataclasses
import re

import browser
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.display import plotting
from gemma_scope_jax.models import forward, masking, predictions
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached, jumprelu

TEXT = "law & <i>bread</i>"
PROMPT = [masking.BOS, *tiny.encode(TEXT)]
IN, OUT = Site("mlp_in", 2), Site("mlp_out", 2)


def identity() -> jumprelu.SAE:
    """An SAE with two latents per input value, one for each sign; it reconstructs its input exactly."""
    both = np.concatenate([np.eye(32), -np.eye(32)]).astype(np.float32)
    zeros = np.zeros(64, np.float32)
    return jumprelu.SAE(both.T, zeros, zeros, both, np.zeros(32, np.float32))


def of_heads() -> jumprelu.SAE:
    """An SAE of the 64 values of the attention heads."""
    rng = np.random.default_rng(9)
    w = rng.normal(size=(64, 48)).astype(np.float32)
    return jumprelu.SAE(
        w, np.zeros(48, np.float32), np.ones(48, np.float32), 0.1 * w.T, np.zeros(64, np.float32)
    )


SUBJECTS = {
    "deep": attached.Subject(random_sae(0), Site("resid_post", 3), None),
    "perfect": attached.Subject(identity(), Site("resid_post", 1), None),
    "<b>shallow</b>": attached.Subject(random_sae(1), Site("resid_post", 0), None),
    "mlp": attached.Subject(random_sae(2), OUT, None),
    "transcoder": attached.Subject(random_sae(3), IN, None, OUT),
    "heads": attached.Subject(of_heads(), Site("attn_out", 1), None),
}


def open_scope(loaded, mesh, names=tuple(SUBJECTS)):
    return scopes.make(loaded, {name: SUBJECTS[name] for name in names}, mesh)


@pytest.fixture(scope="module")
def flow(tiny_gemma):
    return analysis.flow(open_scope(tiny_gemma, sharding.one_device()), TEXT, "e")


def softmax(logits):
    shifted = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def reconstruction(name, values):
    """Returns y, the latents and the reconstruction of y, in float64."""
    subject = SUBJECTS[name]
    x, y = (np.float64(values[site][0]) for site in (subject.site, subject.spliced))
    pre = x @ np.float64(subject.sae.W_enc) + subject.sae.b_enc
    f = np.where(pre > subject.sae.threshold, np.maximum(pre, 0), 0)
    return y, f, f @ np.float64(subject.sae.W_dec) + subject.sae.b_dec


@pytest.fixture(scope="module")
def walked(tiny_gemma):
    """The activations of all sites, and a function: p [L, V] of the next tokens with sites replaced."""
    tokens = jnp.asarray([PROMPT])
    sites = {site for subject in SUBJECTS.values() for site in (subject.site, subject.spliced)}
    x = forward.embed(tiny_gemma, tokens)
    _, values = forward.run_blocks(tiny_gemma, x, tokens, range(4), read=sites)

    def predict(write):
        final, _ = forward.run_blocks(tiny_gemma, x, tokens, range(4), write=write)
        return softmax(predictions.logits(tiny_gemma, final)[0])

    return values, predict


@pytest.mark.parametrize("name", SUBJECTS)
def test_each_array_equals_slow_numpy(flow, walked, name):
    values, predict = walked
    number = flow.names.index(name)
    y, f, recon = reconstruction(name, values)
    error = np.linalg.norm(y - recon, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(flow.norm_ExL[number], np.linalg.norm(y, axis=1)[1:], rtol=1e-5)
    np.testing.assert_array_equal(flow.l0_ExL[number], (f > 0).sum(1)[1:])
    np.testing.assert_allclose(flow.error_ExL[number], error[1:], rtol=1e-4, atol=1e-6)

    replaced = np.concatenate([y[:1], recon[1:]])[None].astype(np.float32)
    spliced = predict({SUBJECTS[name].spliced: lambda _: jnp.asarray(replaced)})
    target = np.array(PROMPT[2:])
    loss, clean = (-np.log(p[np.arange(1, len(PROMPT) - 1), target]) for p in (spliced, predict({})))
    np.testing.assert_allclose(flow.delta_loss_ExL[number, :-1], loss - clean, atol=2e-5)
    assert np.isnan(flow.delta_loss_ExL[number, -1])
    if name != "perfect":
        assert np.abs(loss - clean).max() > 1e-3


def test_saes_are_sorted_by_kind_of_site_and_then_by_layer(flow):
    assert flow.names == ("heads", "transcoder", "mlp", "<b>shallow</b>", "perfect", "deep")
    assert flow.kinds == ("attn_out", "mlp_in → mlp_out", "mlp_out", *["resid_post"] * 3)
    assert flow.layers == (1, 2, 2, 0, 1, 3) and flow.of_kind("resid_post") == [3, 4, 5]
    assert "".join(flow.tokens) == TEXT


def test_the_lens_equals_slow_numpy(flow, walked, tiny_gemma):
    values, predict = walked
    lens, answer = flow.lens, tiny.encode("e")[0]
    assert lens.layers == ("0", "1", "3") and lens.is_given
    scale = np.float64(tiny_gemma.params["final_norm"]["scale"])
    table = np.float64(tiny_gemma.params["embedder"]["input_embedding"])

    def read_out(x):
        normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
        return softmax(3 * np.tanh(normed @ table.T / 3))

    def check(seen, row, p):
        rank = 1 + (p > p[:, [answer]]).sum(1)
        for got, expected in zip(seen, (p.argmax(1), p.max(1), p[:, answer], rank), strict=True):
            np.testing.assert_allclose(got[row], expected, rtol=1e-4)

    for row, name in enumerate(("<b>shallow</b>", "perfect", "deep")):
        y, _, recon = reconstruction(name, values)
        check(lens.stream, row, read_out(y)[1:])
        check(lens.reconstruction, row, read_out(recon)[1:])
    check(lens.output, 0, predict({})[1:])


def test_an_exact_reconstruction_costs_nothing_and_reads_out_the_same(flow):
    number = flow.names.index("perfect")
    # The clean prompt is another row of the same pass, so the losses differ by rounding.
    np.testing.assert_allclose(flow.delta_loss_ExL[number, :-1], 0, atol=1e-5)
    np.testing.assert_array_equal(flow.error_ExL[number], 0)
    for stream, reconstruction in zip(flow.lens.stream, flow.lens.reconstruction, strict=True):
        np.testing.assert_allclose(stream[1], reconstruction[1], rtol=1e-5)
        assert (stream[2] != reconstruction[2]).any()


def test_without_an_answer_the_lens_follows_the_models_prediction(flow, tiny_gemma, walked):
    _, predict = walked
    scope = open_scope(tiny_gemma, sharding.make_mesh(2, 2, jax.devices()[:4]), ("deep",))
    found = analysis.flow(scope, TEXT)
    np.testing.assert_array_equal(found.lens.answer_L, predict({})[1:].argmax(1))
    np.testing.assert_array_equal(found.lens.stream.answer_rank[0], 1)
    np.testing.assert_allclose(found.lens.stream.answer_probability, found.lens.stream.probability)
    # Four devices agree with one.
    number = flow.names.index("deep")
    np.testing.assert_allclose(found.delta_loss_ExL[0], flow.delta_loss_ExL[number], atol=1e-5)
    np.testing.assert_allclose(found.error_ExL[0], flow.error_ExL[number], rtol=1e-5)


def test_figures_show_tokens_layers_and_the_likeliest_tokens(flow):
    figure = flow.figure()
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert len(maps) == 4 * 4 and maps[-4].get_title() == "resid_post: ‖y‖"
    assert [label.get_text() for label in maps[-4].get_yticklabels()] == ["0", "1", "3"]
    below = [label.get_text() for label in maps[-1].get_xticklabels()]
    assert below == [token.replace(" ", "·") for token in flow.tokens]
    np.testing.assert_array_equal(maps[-1].images[0].get_array(), flow.delta_loss_ExL[3:])
    # Outliers do not stretch the colour scale: the largest value is beyond it.
    norm = maps[-4].images[0].norm
    np.testing.assert_allclose(norm.vmax, np.percentile(flow.norm_ExL[3:], 98))
    assert norm.vmax < flow.norm_ExL[3:].max()

    lens = flow.lens
    stream, _ = lens.figure().axes
    texts = [text.get_text() for text in stream.texts if text.get_fontsize() == 7]
    row = [plotting.label(lens.texts[int(token)], 9) for token in lens.output.token[0]]
    assert texts[: len(row)] == row
    assert [label.get_text() for label in stream.get_yticklabels()] == ["output", "3", "1", "0"]
    framed = sum(token == lens.answer_L[0] for token in (*lens.output.token[0], *lens.stream.token.flat))
    assert len(stream.patches) == framed
    assert plotting.png(figure)[:4] == b"\x89PNG"


def test_panels_are_stacked_for_many_tokens(flow):
    values = {
        field: np.tile(getattr(flow, field), 5)
        for field in ("norm_ExL", "l0_ExL", "error_ExL", "delta_loss_ExL")
    }
    long = dataclasses.replace(flow, tokens=5 * flow.tokens, **values).figure()
    assert long.get_figwidth() <= 16 and long.axes[0].get_gridspec().ncols == 1
    maps = [axis for axis in long.axes if axis.get_title()]
    assert [bool(axis.get_xlabel()) for axis in maps] == 4 * [False, False, False, True]


@pytest.mark.parametrize("tokens", [1, 3, 18])
def test_the_title_of_a_lens_is_not_cut_off(flow, tokens):
    def cut(seen):
        return type(seen)(*(values[:, :tokens] for values in seen))

    lens = flow.lens
    parts = {field: cut(getattr(lens, field)) for field in ("stream", "reconstruction", "output")}
    parts |= {"tokens": lens.tokens[:tokens], "answer_L": lens.answer_L[:tokens], "is_given": False}
    figure = dataclasses.replace(lens, **parts).figure()
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert "number: its rank" in figure.get_suptitle().replace("\n", " ")


def test_labels_can_be_drawn():
    assert plotting.label(" a\nb") == "·a↵b" and plotting.label("x" * 20) == "x" * 11 + "…"
    assert plotting.label("語\x00$") == r"\u8a9e\x00$"
    # An escape sequence is kept whole or dropped.
    assert plotting.label("語" * 3) == r"\u8a9e…" and plotting.label("語" * 3, 3) == r"\u8a9e…"


def test_a_page_escapes_text(flow, tmp_path):
    flow.write_html(tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text()
    assert "<i>bread" not in html and "&lt;i&gt;bread" in html
    assert "<b>shallow" not in html and "&lt;b&gt;shallow&lt;/b&gt;" in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)
    assert html.count("<tr><th>") == 2 * (1 + 3 + 1) + 1
    rank = flow.lens.stream.answer_rank[0, 5]
    assert rank == 1 or f", rank {rank}" in html


@browser.needs_chromium
def test_a_browser_shows_the_picture_and_a_cells_probabilities(flow, tmp_path):
    flow.write_html(tmp_path / "a.html")
    pointed = """
      const cell = document.querySelector(".lens td");
      cell.scrollIntoView();
      const at = cell.getBoundingClientRect();
      document.title = document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2).closest("td").title
        + "; picture " + document.querySelector("img").naturalWidth;
    """
    html = browser.dump(tmp_path / "a.html", then=pointed)
    title = re.search(r"<title>(.*?)</title>", html, re.DOTALL)[1]
    likeliest = flow.lens.output.probability[0, 0]
    assert f"{likeliest:.3g}; " in title and int(title.split("; picture ")[1]) > 500
    assert "<i>bread" not in html and "<b>shallow" not in html


@browser.needs_chromium
def test_the_page_does_not_scroll_sideways(flow, tmp_path):
    names = tuple(f"{i}_{'long_name_' * 9}" for i in range(len(flow.names)))
    lens = dataclasses.replace(flow.lens, layers=names[:3])
    dataclasses.replace(flow, names=names, lens=lens).write_html(tmp_path / "a.html")
    assert browser.beyond(tmp_path / "a.html") == 0


def test_the_terminal_shows_means_and_the_last_token(flow, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    flow.show()
    shown = capsys.readouterr().out
    delta = flow.delta_loss_ExL[flow.names.index("mlp")]
    assert re.search(rf"mlp .* \{np.nanmean(delta):+.3f} ", shown), shown
    assert f"{flow.lens.stream.answer_rank[2, -1]:,}" in shown and "rank of 'e'" in shown


@pytest.mark.parametrize(
    ("text", "answer", "message"),
    [
        ("", None, "the text is empty"),
        ("law", "union", r"'union' is 5 tokens \('u' \+ 'n' \+ 'i'"),
        ("law", "", "is 0 tokens"),
    ],
)
def test_invalid_arguments_are_refused(tiny_gemma, text, answer, message):
    scope = open_scope(tiny_gemma, sharding.one_device(), ("deep",))
    with pytest.raises(ValueError, match=message):
        analysis.flow(scope, text, answer)
