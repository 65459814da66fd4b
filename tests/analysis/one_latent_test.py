"""A close look at one latent, compared with slow NumPy."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached

SITE = Site("resid_post", 1)
SUBJECTS = {
    "stream": attached.Subject(random_sae(0), SITE, None),
    "read": attached.Subject(random_sae(1), Site("mlp_in", 1), None),
}
TEXTS = ["rivers of bread, $x$ and <b>", "laws of\nstars and songs", "no bread today"]
TOKENS = np.array([([masking.BOS, *tiny.encode(text)] * 4)[:48] for text in TEXTS], np.int32)


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    return scopes.make(tiny_gemma, SUBJECTS, held_out=TOKENS)


@pytest.fixture(scope="module")
def f_SxLxM(tiny_gemma):
    """The activations of all latents in float64, with zeros at BOS."""
    x = forward.read_sites(tiny_gemma, jnp.asarray(TOKENS), [SITE])[SITE]
    of = SUBJECTS["stream"].sae
    pre = np.float64(x) @ np.float64(of.W_enc) + of.b_enc
    return np.where((pre > of.threshold) & (TOKENS != masking.BOS)[..., None], np.maximum(pre, 0), 0)


def test_a_look_at_a_latent_equals_slow_numpy(scope, f_SxLxM):
    latent = int((f_SxLxM > 0).sum((0, 1)).argmax())
    look = analysis.look_at(scope, "stream", latent)
    f_SxL = f_SxLxM[..., latent]
    counted = (TOKENS != masking.BOS).sum()
    assert (look.activations, look.histogram_H.sum()) == (counted, (f_SxL > 0).sum())
    expected = ((f_SxL > 0).sum() / counted, f_SxL[f_SxL > 0].mean(), f_SxL.max())
    np.testing.assert_allclose((look.frequency, look.mean, look.largest), expected, rtol=1e-5)
    row, position = np.unravel_index(f_SxL.argmax(), f_SxL.shape)
    first = look.strongest[0]
    assert first.tokens[first.peak] == tiny.load_tokenizer().decode([int(TOKENS[row, position])])
    np.testing.assert_allclose(first.values[first.peak], f_SxL.max(), rtol=1e-5)
    assert 1 <= len(look.sampled) <= 5 and len(look.raises) == len(look.lowers) == 10
    assert [value for _, value in look.raises] == sorted((value for _, value in look.raises), reverse=True)


def test_saes_that_keep_the_strongest_latents_are_refused(tiny_gemma):
    few = attached.Subject(random_sae(0), SITE, None, top_k=2)
    with pytest.raises(ValueError, match="few keeps the 2 strongest latents"):
        scopes.make(tiny_gemma, {"few": few})


def test_selected_latents_of_a_subject_keep_the_requested_order():
    made = attached.alone(SUBJECTS["stream"], [5, 2]).sae
    of = SUBJECTS["stream"].sae
    np.testing.assert_array_equal(made.W_enc, np.stack([of.W_enc[:, 5], of.W_enc[:, 2]], 1))
    np.testing.assert_array_equal(made.W_dec, np.stack([of.W_dec[5], of.W_dec[2]]))


def test_a_site_outside_the_stream_raises_no_tokens(scope):
    frequency_M = analysis.activity(scope, 3, ["read"])["read"].frequency_M
    look = analysis.look_at(scope, "read", int(frequency_M.argmax()))
    assert look.raises is look.lowers is None
    look.figure()


def test_text_is_shown_literally(scope, f_SxLxM, capsys):
    look = analysis.look_at(scope, "stream", int((f_SxLxM > 0).sum((0, 1)).argmax()))
    look = dataclasses.replace(look, sae=r"[red]$\q$")  # As mathematics, the name would raise.
    look.show()
    shown = capsys.readouterr().out
    assert "latent" in shown and r"[red]$\q$" in shown and "↵" in shown
    figure = look.figure(top=3)
    assert figure.axes[0].texts and r"[red]\$\q\$" in figure.get_suptitle()
    figure.savefig("/dev/null", format="png")
    values = [text.get_text() for text in figure.axes[0].texts if text.get_ha() == "right"]
    assert values == [f"{one.values[one.peak]:.4g}" for one in look.strongest[:3]]


@pytest.mark.parametrize("bins", [1, 3, 9, 40, collect.BINS])
def test_ticks_of_the_histogram_are_few_and_do_not_overlap(scope, f_SxLxM, bins):
    look = analysis.look_at(scope, "stream", int((f_SxLxM > 0).sum((0, 1)).argmax()))
    histogram_H = np.where(np.arange(collect.BINS) < bins, 3, 0)
    figure = dataclasses.replace(look, histogram_H=histogram_H).figure()
    figure.draw_without_rendering()
    axis = figure.axes[1]
    low, high = axis.get_xlim()
    shown = [tick for tick in axis.get_xticklabels(which="both") if low <= tick.get_position()[0] <= high]
    boxes = [tick.get_window_extent() for tick in shown if tick.get_text()]
    assert 2 <= len(boxes) <= 12
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("name", "latent", "rows", "message"),
    [
        ("other", 1, 4, "there is no SAE 'other'"),
        ("stream", 64, 4, "stream has no latent 64"),
        ("stream", 1, 0, "rows is 0; it must be at least 1"),
    ],
)
def test_invalid_arguments_are_refused(scope, name, latent, rows, message):
    with pytest.raises(ValueError, match=message):
        analysis.look_at(scope, name, latent, rows)


def test_a_silent_latent_is_refused(tiny_gemma):
    silent = random_sae(0).replace(threshold=np.full(64, 1e9, np.float32))
    scope = scopes.make(tiny_gemma, {"a": attached.Subject(silent, SITE, None)}, held_out=TOKENS)
    with pytest.raises(ValueError, match="latent 3 of a never fires on 3 held-out rows"):
        analysis.look_at(scope, "a", 3)
