"""Effects of a latent on later latents, against finite differences and ablation by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.analysis.layers.links import virtual_weights
from gemma_scope_jax.display import plotting
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached, jumprelu

TEXT = "rivers of bread and laws"
PROMPT = [masking.BOS, *tiny.encode(TEXT)]


def of_heads() -> jumprelu.SAE:
    """An SAE of the 64 values of the attention heads."""
    rng = np.random.default_rng(9)
    w = rng.normal(size=(64, 48)).astype(np.float32)
    return jumprelu.SAE(
        w, np.zeros(48, np.float32), np.ones(48, np.float32), 0.1 * w.T, np.zeros(64, np.float32)
    )


def partly_silent(seed: int) -> jumprelu.SAE:
    """A random SAE whose latents from 48 on never fire."""
    made = random_sae(seed)
    return made.replace(threshold=np.where(np.arange(64) < 48, made.threshold, 1e9).astype(np.float32))


SUBJECTS = {
    "last": attached.Subject(partly_silent(0), Site("resid_post", 3), None),
    "source": attached.Subject(partly_silent(1), Site("resid_post", 0), None),
    "beside": attached.Subject(random_sae(7), Site("resid_post", 0), None),
    "heads": attached.Subject(of_heads(), Site("attn_out", 1), None),
    "reads": attached.Subject(random_sae(2), Site("mlp_in", 2), None),
    "free": attached.Subject(random_sae(5), Site("mlp_in_gain_free", 3), None),
    "transcoder": attached.Subject(random_sae(3), Site("mlp_in", 1), None, Site("mlp_out", 1)),
}


def open_scope(loaded, mesh, names=tuple(SUBJECTS), held_out=None):
    return scopes.make(loaded, {name: SUBJECTS[name] for name in names}, mesh, held_out=held_out)


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    return open_scope(tiny_gemma, sharding.one_device())


def pre_activations(subject, x):
    return np.float64(x) @ np.float64(subject.W_enc) + subject.b_enc


def latents(subject, x):
    """The latents in float64, with zeros at BOS."""
    pre = pre_activations(subject, x)
    f = np.where(pre > subject.threshold, np.maximum(pre, 0), 0)
    f[0] = 0
    return f


class Walk:
    """Gemma on a prompt, with a latent's part of its site scaled by a share."""

    def __init__(self, loaded, name, tokens):
        self.loaded, self.subject, self.tokens = loaded, SUBJECTS[name], jnp.asarray([tokens])
        self.sites = {subject.site for subject in SUBJECTS.values()} | {self.subject.spliced}
        values = self.values({})
        self.f_LxM = latents(self.subject.sae, values[self.subject.site][0])
        self.y_LxO = np.float64(values[self.subject.spliced][0])

    def values(self, write):
        x = forward.embed(self.loaded, self.tokens)
        return forward.run_blocks(self.loaded, x, self.tokens, range(4), read=self.sites, write=write)[1]

    def with_share(self, latent, share):
        part = self.f_LxM[:, latent, None] * np.float64(self.subject.sae.W_dec)[latent]
        changed = jnp.asarray((self.y_LxO + (share - 1) * part)[None], jnp.float32)
        return self.values({self.subject.spliced: lambda _: changed})


@pytest.fixture(scope="module", params=["source", "transcoder"])
def linked(request, scope):
    walk = Walk(scope.gemma, request.param, PROMPT)
    latent = int((walk.f_LxM > 0).sum(0).argmax())
    return walk, latent, analysis.links(scope, request.param, latent, text=TEXT)


def test_later_saes_are_those_that_read_after_the_latents_site(linked):
    _, _, found = linked
    behind = {
        "source": ["heads", "transcoder", "reads", "free", "last"],
        "transcoder": ["reads", "free", "last"],
    }
    assert list(found.effect) == behind[found.name]


def test_effects_equal_ablation_by_hand(linked):
    walk, latent, found = linked
    fires = int((walk.f_LxM[:, latent] > 0).sum())
    assert (found.firings, found.activations) == (fires, len(PROMPT) - 1) and 2 < fires < len(PROMPT) - 1
    np.testing.assert_allclose(found.activation, walk.f_LxM[:, latent].sum() / fires, rtol=1e-5)
    clean, ablated = walk.values({}), walk.with_share(latent, 0)
    for name, effect_M in found.effect.items():
        later = SUBJECTS[name]
        f, without = (latents(later.sae, values[later.site][0]) for values in (clean, ablated))
        np.testing.assert_allclose(effect_M, (f - without).sum(0) / fires, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.frequency[name], (f > 0)[1:].mean(0), atol=1e-6)
        np.testing.assert_allclose(found.unit[name], f[f > 0].mean(), rtol=1e-4)
        assert np.abs(effect_M).max() > 0.01


def test_attributions_equal_finite_differences_of_firing_latents(linked):
    walk, latent, found = linked
    step = 1e-2
    shares = (1 + step / 2, 1 - step / 2, 1 + step, 1 - step)
    clean, *moved = walk.values({}), *(walk.with_share(latent, share) for share in shares)
    for name, attribution_M in found.attribution.items():
        later = SUBJECTS[name]
        pre = [pre_activations(later.sae, values[later.site][0]) for values in moved]
        # A fourth-order difference, since the small model is strongly nonlinear.
        slope = (8 * (pre[0] - pre[1]) - (pre[2] - pre[3])) / (6 * step)
        fires = latents(later.sae, clean[later.site][0]) > 0
        expected = np.where(fires, slope, 0).sum(0) / found.firings
        np.testing.assert_allclose(attribution_M, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
        assert np.abs(expected).max() > 0.01


def test_virtual_weights_are_products_in_the_stream(linked, scope):
    _, latent, found = linked
    written = np.float64(SUBJECTS[found.name].sae.W_dec[latent])
    gain = 1 + np.float64(scope.gemma.params["layer_2"]["pre_ffw_norm"]["scale"])
    for name in found.effect:
        reads = np.float64(SUBJECTS[name].sae.W_enc)
        if name == "heads":
            assert found.weight[name] is None and found.cosine[name] is None
            continue
        reads = reads * gain[:, None] if name == "reads" else reads
        if name == "transcoder":
            continue
        np.testing.assert_allclose(found.weight[name], written @ reads, rtol=1e-5)
        lengths = np.linalg.norm(reads, axis=0) * np.linalg.norm(written)
        np.testing.assert_allclose(found.cosine[name], written @ reads / lengths, rtol=1e-5)


def test_virtual_weights_of_heads_go_through_the_output_projection(scope):
    weight_M, cosine_M = virtual_weights(scope, SUBJECTS["heads"], 0, SUBJECTS["last"])
    block = scope.gemma.params["layer_1"]
    w = np.float64(block["attn"]["attn_vec_einsum"]["w"]).reshape(64, 32)
    written = (
        np.float64(SUBJECTS["heads"].sae.W_dec[0])
        @ w
        * (1 + np.float64(block["post_attention_norm"]["scale"]))
    )
    reads = np.float64(SUBJECTS["last"].sae.W_enc)
    np.testing.assert_allclose(weight_M, written @ reads, rtol=1e-4, atol=1e-4)
    lengths = np.linalg.norm(reads, axis=0) * np.linalg.norm(written)
    np.testing.assert_allclose(cosine_M, written @ reads / lengths, rtol=1e-4, atol=1e-5)


def test_the_strongest_latents_and_the_correlations(linked):
    _, _, found = linked
    strongest = found.strongest(5)
    sizes = [abs(found.effect[name][latent]) / found.unit[name] for name, latent in strongest]
    in_units = [np.abs(effect_M) / found.unit[name] for name, effect_M in found.effect.items()]
    every = np.sort(np.concatenate(in_units))[::-1]
    np.testing.assert_array_equal(sizes, every[:5])
    reached = (found.effect["last"] != 0) | (found.attribution["last"] != 0)
    for what in (found.attribution, found.weight):
        expected = np.corrcoef(what["last"][reached], found.effect["last"][reached])[0, 1]
        np.testing.assert_allclose(found.correlation(what, "last"), expected)
    assert 0 < reached.sum() <= 48 and np.isnan(found.correlation({"last": None}, "last"))


def test_the_terminal_and_a_figure_show_the_links(linked, capsys, monkeypatch):
    _, _, found = linked
    monkeypatch.setenv("COLUMNS", "200")
    found.show(3)
    shown = capsys.readouterr().out
    name, later = found.strongest(1)[0]
    line = next(line for line in shown.splitlines() if f" {later} " in line and name in line)
    assert f"{found.effect[name][later]:+.3g}" in line and f"{found.attribution[name][later]:+.3g}" in line
    left, right = found.figure().axes[:2]
    assert right.get_xlabel() == "weight, W_dec · W_enc" and "attribution" in left.get_xlabel()
    points = sum(len(drawn.get_offsets()) for drawn in left.collections)
    assert points == sum(found.is_reached(name).sum() for name in found.effect)
    assert f"{name} {later}" in [text.get_text() for text in left.texts]
    by_name = ("weight", "cosine", "attribution", "effect", "frequency", "unit", "layer")
    renamed = {
        field: {rf"$\q$ [/] {name}": value for name, value in getattr(found, field).items()}
        for field in by_name
    }
    odd = dataclasses.replace(found, **renamed)
    odd.show(3)
    plotting.png(odd.figure())


def test_held_out_rows_on_several_devices(tiny_gemma):
    rows = tiny.tokens(3, len(PROMPT), seed=4)

    mesh = sharding.make_mesh(2, 1, jax.devices()[:2])
    scope = open_scope(tiny_gemma, mesh, ("source", "last"), rows)
    found = analysis.links(scope, "source", 5, rows=3)
    kept = np.asarray(masking.is_kept(jnp.asarray(rows), 0))
    effect, firings = 0, 0
    for row, is_kept in zip(rows, kept, strict=True):
        walk = Walk(tiny_gemma, "source", row)
        walk.f_LxM *= is_kept[:, None]
        site = SUBJECTS["last"].site
        f, without = (
            latents(SUBJECTS["last"].sae, values[site][0]) * is_kept[:, None]
            for values in (walk.values({}), walk.with_share(5, 0))
        )
        effect, firings = effect + (f - without).sum(0), firings + (walk.f_LxM[:, 5] > 0).sum()
    assert (found.activations, found.firings) == (kept.sum(), firings) and firings > 2
    np.testing.assert_allclose(found.effect["last"], effect / firings, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", 1), "there is no SAE 'other'"),
        (("source", 64), "source has no latent 64"),
        (("source", 1, "other"), "there is no SAE 'other'; choose from last, source"),
        (
            ("source", 1, "beside"),
            "beside reads layer_0_resid_post, which is not after layer_0_resid_post of source",
        ),
        (("last", 1), "no SAE reads a site after layer_3_resid_post of last"),
        (("source", 1, None, 8, ""), "the text is empty"),
        (("source", 1, None, 0), "rows is 0"),
        (("source", 1), "this scope has no held-out text"),
    ],
)
def test_invalid_arguments_are_refused(scope, arguments, message):
    with pytest.raises(ValueError, match=message):
        analysis.links(scope, *arguments)


def test_a_silent_latent_is_refused(scope):
    with pytest.raises(ValueError, match="latent 60 of source does not fire on these 24 activations"):
        analysis.links(scope, "source", 60, text=TEXT)
