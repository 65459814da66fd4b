"""Attributions and ablations, compared with a slow Gemma in float64 NumPy."""

import dataclasses
import json
import re

import browser
import jax
import numpy as np
import pytest
import scopes
import tiny
from scipy import special
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.analysis import session as scope_lib
from gemma_scope_jax.analysis.attribution import ablation
from gemma_scope_jax.analysis.attribution import gradients as gradients_lib
from gemma_scope_jax.cli.commands import analysis as analysis_lib
from gemma_scope_jax.display import plotting
from gemma_scope_jax.models import masking
from gemma_scope_jax.models import placement as placement_lib
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached, jumprelu

RESID, MLP, EMBED = Site("resid_post", 1), Site("mlp_out", 2), Site("embed", 0)
READ, HEADS = Site("mlp_in", 2), Site("attn_out", 1)


def wide_sae():
    rng = np.random.default_rng(7)
    arrays = dict(
        W_enc=rng.normal(size=(64, 48)), b_enc=rng.normal(size=48), threshold=np.ones(48),
        W_dec=0.2 * rng.normal(size=(48, 64)), b_dec=rng.normal(size=64),
    )  # fmt: skip
    return jumprelu.SAE(**{k: v.astype(np.float32) for k, v in arrays.items()})


W_SKIP = np.random.default_rng(8).normal(size=(32, 32)).astype(np.float32) / 8
SUBJECTS = {
    "resid": attached.Subject(random_sae(0), RESID, None),
    "beside": attached.Subject(random_sae(1), RESID, None),
    "mlp": attached.Subject(random_sae(2), MLP, None),
    "embed": attached.Subject(random_sae(3), EMBED, None),
    "heads": attached.Subject(wide_sae(), HEADS, None),
    "skip": attached.Subject(random_sae(4).replace(W_skip=W_SKIP), READ, None, MLP),
}
SPLICED = (RESID, MLP, EMBED, HEADS)
TEXT = "rivers of bread"
IDS = [masking.BOS, *tiny.encode(TEXT)]


def scope_on(mesh, tiny_gemma):
    return scopes.make(tiny_gemma.replace(mesh=mesh), SUBJECTS)


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    return scope_on(sharding.one_device(), tiny_gemma)


@pytest.fixture(scope="module")
def found(scope):
    return analysis.attribute(scope, TEXT)


@pytest.fixture(scope="module")
def ablated(scope, found):
    return analysis.ablations(scope, found, 24)


PARAMS = jax.tree.map(np.float64, tiny.params())


def norm(x, part):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + part["scale"])


def rotate(x_LxNxH):
    length, _, width = x_LxNxH.shape
    angle = np.arange(length)[:, None] / 10_000 ** (2 / width * np.arange(width // 2))
    sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
    a, b = np.split(x_LxNxH, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def slow_gemma(ids, added=None):
    """The logits [V] after the last token and the activations, with `added` values at its sites."""
    values, c = {}, tiny.TinyGemma.config

    def tap(kind, layer, value):
        site = Site(kind, layer)
        values[site] = value + (added or {}).get(site, 0)
        return values[site]

    x = tap("embed", 0, PARAMS["embedder"]["input_embedding"][ids] * np.sqrt(32))
    index = np.arange(len(ids))
    for layer in range(4):
        p = PARAMS[f"layer_{layer}"]
        h = norm(x, p["pre_attention_norm"])
        q = rotate(np.einsum("ld,ndh->lnh", h, p["attn"]["q_einsum"]["w"])) / 4
        k, v = np.einsum("ld,ckdh->clkh", h, p["attn"]["kv_einsum"]["w"]).repeat(2, axis=2)
        scores = 5 * np.tanh(np.einsum("lnh,tnh->nlt", q, rotate(k)) / 5)
        behind = index[:, None] - index
        window = 6 if c.attention_types[layer] is tiny.LOCAL else 99
        scores = np.where((behind >= 0) & (behind < window), scores, -np.inf)
        z = np.einsum("nlt,tnh->lnh", special.softmax(scores, -1), v)
        z = tap("attn_out", layer, z.reshape(len(ids), 64)).reshape(z.shape)
        x = x + norm(np.einsum("lnh,nhd->ld", z, p["attn"]["attn_vec_einsum"]["w"]), p["post_attention_norm"])
        h = tap("mlp_in", layer, norm(x, p["pre_ffw_norm"]))
        a, b = np.einsum("ld,ndf->nlf", h, p["mlp"]["gating_einsum"])
        gelu = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
        x = x + tap("mlp_out", layer, norm(gelu * b @ p["mlp"]["linear"], p["post_ffw_norm"]))
        x = tap("resid_post", layer, x)
    last = norm(x, PARAMS["final_norm"])[-1]
    return 3 * np.tanh(last @ PARAMS["embedder"]["input_embedding"].T / 3), values


def slow_metric(found, added=None):
    logits = slow_gemma(list(found.ids), added)[0]
    return logits[found.answer[0]] - (logits.mean() if found.against is None else logits[found.against[0]])


def latents(name, values):
    """The latents in float64, with zeros at BOS."""
    subject = SUBJECTS[name].sae
    pre = values[SUBJECTS[name].site] @ np.float64(subject.W_enc) + subject.b_enc
    f_LxM = np.where(pre > subject.threshold, np.maximum(pre, 0), 0)
    f_LxM[0] = 0
    return f_LxM


def gradients(scope, found, answer=None, against=None):
    placed = scope_lib.place_prompts(scope, [found.ids])
    chosen = (answer or found.answer[0], against or found.against[0])
    metric = gradients_lib.metric_after(found.ids, *chosen)
    return gradients_lib.differentiate(scope, placed, metric, gradients_lib.zeros(scope, placed, SPLICED))


def test_the_two_likeliest_tokens_are_compared_by_default(found):
    logits, _ = slow_gemma(IDS)
    first, second = np.argsort(-logits)[:2]
    assert found.ids == tuple(IDS) and "".join(found.tokens) == TEXT
    assert (found.answer[0], found.against[0]) == (first, second)
    np.testing.assert_allclose(found.metric, logits[first] - logits[second], atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "against", "token"), [("a", None, 4), ("z", "mean", -3), (None, "q", 0), ("a", "b", -1)]
)
def test_the_metric_is_measured_after_the_chosen_token(scope, answer, against, token):
    ids = IDS[: range(1, len(IDS))[token] + 1]
    logits, _ = slow_gemma(ids)
    found = analysis.attribute(scope, TEXT, answer, against, token)
    a = logits.argmax() if answer is None else tiny.encode(answer)[0]
    rest = np.where(np.arange(272) == a, -np.inf, logits)
    b = rest.argmax() if against is None else None if against == "mean" else tiny.encode(against)[0]
    assert found.answer[0] == a and (found.against and found.against[0]) == b
    expected = logits[a] - (logits.mean() if b is None else logits[b])
    np.testing.assert_allclose(found.metric, expected, atol=1e-5)
    assert found.ids == tuple(ids)
    assert all(len(parts.total_L) == len(ids) - 1 for parts in found.parts.values())


def test_the_likeliest_answer_differs_from_the_token_it_is_compared_with(scope, found):
    """Otherwise the difference of the logits would be zero."""
    turned = gradients(scope, found, gradients_lib.LIKELIEST, found.answer[0])
    assert (turned.answer_S[0], turned.against_S[0]) == (found.against[0], found.answer[0])
    np.testing.assert_allclose(turned.metric_S[0], -found.metric, atol=1e-5)


@pytest.mark.parametrize("site", SPLICED)
def test_gradients_equal_differences_in_float64(scope, found, site):
    g = np.float64(gradients(scope, found).gradients[site][0])
    rng = np.random.default_rng(0)
    for _ in range(12):
        way, h = rng.normal(size=g.shape), 1e-5
        difference = slow_metric(found, {site: h * way}) - slow_metric(found, {site: -h * way})
        np.testing.assert_allclose((g * way).sum(), difference / (2 * h), atol=1e-5 * np.linalg.norm(g))


@pytest.mark.parametrize("name", SUBJECTS)
def test_parts_equal_slow_numpy_and_add_up_to_the_total(scope, found, name):
    subject, parts = SUBJECTS[name], found.parts[name]
    _, values = slow_gemma(IDS)
    g = np.float64(gradients(scope, found).gradients[subject.spliced][0, : len(IDS)])
    y, f = values[subject.spliced], latents(name, values)
    W_dec, b_dec = np.float64(subject.sae.W_dec), np.float64(subject.sae.b_dec)
    skip = values[subject.site] @ np.float64(W_SKIP) if name == "skip" else 0 * y
    error = y - f @ W_dec - b_dec - skip
    token, latent = np.nonzero(f)
    np.testing.assert_array_equal(parts.token_N, token - 1)
    np.testing.assert_array_equal(parts.latent_N, latent)
    assert len(token) > 50
    np.testing.assert_allclose(parts.activation_N, f[token, latent], rtol=1e-4, atol=1e-4)
    size = np.abs(y * g).sum()
    expected = f[token, latent] * (g[token] * W_dec[latent]).sum(1)
    np.testing.assert_allclose(parts.part_N, expected, atol=1e-5 * size)
    for got, value in (
        (parts.error_L, error),
        (parts.bias_L, b_dec),
        (parts.skip_L, skip),
        (parts.total_L, y),
    ):
        np.testing.assert_allclose(got, (value * g).sum(1)[1:], atol=1e-5 * size)
    together = parts.latents_L + parts.error_L + parts.bias_L + parts.skip_L
    np.testing.assert_allclose(together, parts.total_L, atol=1e-5 * size)
    np.testing.assert_allclose(parts.latents_M.sum(), parts.latents_L.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "skip"])  # Both are at one site and share one program.
def test_integrated_parts_equal_an_integral_in_float64_and_add_up(scope, name):
    found = analysis.integrate(scope, TEXT, name, tolerance=1e-4)
    subject, parts, integral = SUBJECTS[name], found.parts[name], found.integral
    _, values = slow_gemma(IDS)
    W_dec, f = np.float64(subject.sae.W_dec), latents(name, values)
    base = np.float64(subject.sae.b_dec) + (values[READ] @ np.float64(W_SKIP) if name == "skip" else 0)
    whole = values[subject.spliced] - base
    whole[0] = 0

    def on_path(alpha, more=0.0):
        return slow_metric(found, {subject.spliced: (alpha - 1) * whole + more})

    np.testing.assert_allclose(integral.baseline, on_path(0.0), atol=1e-4)
    gain = on_path(1.0) - on_path(0.0)
    together = parts.latents_L.sum() + parts.error_L.sum()
    assert abs(together - gain) < 2e-4 * abs(gain)
    assert abs(integral.gap) < 1e-4 * abs(gain) and integral.nodes <= 64
    np.testing.assert_allclose(parts.total_L.sum(), together, rtol=1e-4)
    assert not parts.bias_L.any() and not parts.skip_L.any()
    x, weight = np.polynomial.legendre.leggauss(100)
    for n in np.argsort(-np.abs(parts.part_N))[:3]:
        way = np.zeros_like(whole)
        token, latent = parts.token_N[n] + 1, parts.latent_N[n]
        way[token] = f[token, latent] * W_dec[latent]
        slopes = [(on_path(a, 1e-5 * way) - on_path(a, -1e-5 * way)) / 2e-5 for a in (x + 1) / 2]
        np.testing.assert_allclose(parts.part_N[n], (weight / 2 * slopes).sum(), rtol=1e-3)


def test_the_gap_left_by_too_few_nodes_is_shown(scope, capsys):
    found = analysis.integrate(scope, TEXT, "mlp", tolerance=1e-9, most_nodes=4)
    gain = found.metric - found.integral.baseline
    parts = found.parts["mlp"]
    np.testing.assert_allclose(
        found.integral.gap, parts.latents_L.sum() + parts.error_L.sum() - gain, atol=1e-5
    )
    assert found.integral.nodes == 4 and abs(found.integral.gap) > 1e-9 * abs(gain)
    found.show()
    assert f"minus gain: {found.integral.gap:.2g}, with 4 nodes" in " ".join(capsys.readouterr().out.split())


def test_ablations_equal_removing_a_latent_in_float64(found, ablated):
    _, values = slow_gemma(IDS)
    clean = slow_metric(found)
    assert len(ablated.sae) == 24 and len(set(ablated.sae)) >= 4
    for n, name in enumerate(ablated.sae):
        latent, subject = ablated.latent_N[n], SUBJECTS[name]
        gone = -latents(name, values)[:, latent, None] * np.float64(subject.sae.W_dec[latent])
        effect = clean - slow_metric(found, {subject.spliced: gone})
        np.testing.assert_allclose(ablated.effect_N[n], effect, atol=2e-5)
        here = found.parts[name].latent_N == latent
        np.testing.assert_allclose(ablated.attributed_N[n], found.parts[name].part_N[here].sum(), rtol=1e-5)
    assert np.abs(ablated.effect_N).max() > 1e-2


def test_half_are_the_strongest_latents_and_half_are_random(scope, found, ablated):
    every = {
        (name, int(latent)): abs(parts.part_N[parts.latent_N == latent].sum())
        for name, parts in found.parts.items()
        for latent in np.unique(parts.latent_N)
    }
    pairs = list(zip(ablated.sae, ablated.latent_N.tolist(), strict=True))
    strongest = sorted(every, key=lambda pair: -every[pair])[:12]
    assert pairs[:12] == strongest and ablated.is_strongest_N.tolist() == [True] * 12 + [False] * 12
    assert len(set(pairs)) == 24 and set(pairs) <= every.keys()
    again, other = (analysis.ablations(scope, found, 24, seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.latent_N, ablated.latent_N)
    np.testing.assert_array_equal(again.effect_N, ablated.effect_N)
    assert (other.latent_N[12:] != ablated.latent_N[12:]).any()
    assert pairs[:12] == list(zip(other.sae, other.latent_N.tolist(), strict=True))[:12]


def test_no_more_latents_are_ablated_than_fire(scope, found):
    few = dataclasses.replace(found, parts={"embed": found.parts["embed"]})
    count = len(np.unique(found.parts["embed"].latent_N))
    chosen, is_strongest_N = ablation._choose(few, 10_000, 0)
    assert len(set(chosen)) == count == len(is_strongest_N) and is_strongest_N.all()


def test_correlations_equal_numpy(ablated):
    for of, here in (("all", slice(None)), ("strongest", slice(12)), ("random", slice(12, None))):
        x, y = ablated.attributed_N[here], ablated.effect_N[here]
        got = ablated.correlation(of)
        assert got.latents == len(x)
        np.testing.assert_allclose(got.pearson, np.corrcoef(x, y)[0, 1])
        ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
        np.testing.assert_allclose(got.spearman, np.corrcoef(*ranks)[0, 1])
    two = dataclasses.replace(ablated, prompt_N=np.arange(24) % 2)
    x, y = ablated.attributed_N[1:12:2], ablated.effect_N[1:12:2]
    np.testing.assert_allclose(two.correlation("strongest", 1).pearson, np.corrcoef(x, y)[0, 1])
    x, y = (values[ablated.layer_N == 2] for values in (ablated.attributed_N, ablated.effect_N))
    assert {"mlp", "skip"} >= {name for name, at in zip(ablated.sae, ablated.layer_N, strict=True) if at == 2}
    np.testing.assert_allclose(ablated.correlation(layer=2).pearson, np.corrcoef(x, y)[0, 1])
    flat = dataclasses.replace(ablated, effect_N=np.zeros(24))
    assert np.isnan(flat.correlation().pearson)


def test_ablations_of_prompts_equal_those_of_each_prompt(scope, ablated):
    pooled = analysis.ablations_of_prompts(scope, [TEXT, "bread and law"], 24)
    assert pooled.prompt_N.tolist() == [0] * 24 + [1] * 24
    np.testing.assert_array_equal(pooled.effect_N[:24], ablated.effect_N)
    alone = analysis.ablations(scope, analysis.attribute(scope, "bread and law"), 24, seed=1)
    np.testing.assert_array_equal(pooled.effect_N[24:], alone.effect_N)
    assert pooled.sae == ablated.sae + alone.sae


def test_several_devices_agree_with_one(scope, found, ablated, tiny_gemma):
    # Three devices do not divide the rows of a pass.
    several = scope_on(sharding.make_mesh(1, 3, jax.devices()[:3]), tiny_gemma)
    placement = placement_lib.gemma_placement(several.gemma.mesh, split=True)
    params = jax.tree.map_with_path(
        lambda path, value: jax.device_put(value, placement(path[-1].key, value.shape)), tiny_gemma.params
    )
    several = dataclasses.replace(several, gemma=several.gemma.replace(params=params))
    got = analysis.attribute(several, TEXT)
    assert got.answer == found.answer
    for name, parts in found.parts.items():
        scale = np.abs(parts.part_N).max()
        np.testing.assert_array_equal(got.parts[name].latent_N, parts.latent_N)
        np.testing.assert_allclose(got.parts[name].part_N, parts.part_N, atol=1e-4 * scale)
    many = analysis.ablations(several, got, 24)
    assert many.sae == ablated.sae
    np.testing.assert_allclose(many.effect_N, ablated.effect_N, atol=1e-5)
    one, got = (analysis.integrate(of, TEXT, "resid") for of in (scope, several))
    assert one.integral.nodes == got.integral.nodes
    np.testing.assert_allclose(got.integral.baseline, one.integral.baseline, atol=1e-5)
    scale = np.abs(one.parts["resid"].part_N).max()
    np.testing.assert_allclose(got.parts["resid"].part_N, one.parts["resid"].part_N, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the text is empty"),
        ({"token": 15}, "there is no token 15; the prompt has 15"),
        ({"token": -16}, "there is no token -16"),
        ({"answer": "law"}, "'law' is 3 tokens ('l' + 'a' + 'w'); give a text of one token"),
        ({"against": ""}, "'' is 0 tokens (none); give"),
        ({"answer": "a", "against": "a"}, "answer and against are both 'a'"),
    ],
)
def test_invalid_arguments_are_refused(scope, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        analysis.attribute(scope, **{"prompt": TEXT} | options)


def test_other_mistakes_are_refused(scope, found):
    with pytest.raises(ValueError, match="there is no SAE 'other'; choose from resid, beside"):
        analysis.integrate(scope, TEXT, "other")
    with pytest.raises(ValueError, match="latents is 0; it must be at least 1"):
        analysis.ablations(scope, found, 0)
    with pytest.raises(ValueError, match="there are no prompts"):
        analysis.ablations_of_prompts(scope, [])


def test_the_strongest_and_the_sums_are_shown(found, ablated, capsys, tmp_path):
    strongest = found.strongest(5)
    every = np.concatenate([parts.part_N for parts in found.parts.values()])
    expected = every[np.argsort(-np.abs(every), kind="stable")[:5]]
    np.testing.assert_allclose([row[-1] for row in strongest], expected)
    found.show(5)
    shown = capsys.readouterr().out
    name, latent, token, activation, part = strongest[0]
    assert re.search(
        rf"{name} .* {latent} .* {token} .* {activation:.4g} .* {re.escape(f'{part:+.4f}')}", shown
    )
    sums = found.sums()["heads"]
    assert re.search(
        rf"heads .*{re.escape(f'{sums["error"]:+.3f}')}.*{re.escape(f'{sums["all"]:+.3f}')}", shown
    )
    assert "skip" in sums
    without = dataclasses.replace(found, parts={"heads": found.parts["heads"]})
    assert list(without.sums()["heads"]) == ["latents", "error", "b_dec", "all"]
    ablated.show(3)
    shown = capsys.readouterr().out
    assert f"{ablated.correlation().pearson:.3f}" in shown
    assert re.search(rf"layer 0 .* {ablated.correlation(layer=0).spearman:.3f}\n", shown)
    maps = found.figure().axes[:2]
    for axis, column in zip(maps, ("latents_L", "error_L"), strict=True):
        values = np.asarray(axis.images[0].get_array())
        np.testing.assert_allclose(values, [getattr(parts, column) for parts in found.parts.values()])
        low, high = axis.images[0].get_clim()
        assert -low == high >= np.abs(values).max()
    points = np.concatenate([cloud.get_offsets() for cloud in ablated.figure().axes[0].collections])
    np.testing.assert_allclose(points, np.stack([ablated.attributed_N, ablated.effect_N], 1))


def test_a_page_escapes_text_and_lists_each_tokens_latents(scope, found, tmp_path):
    named = dataclasses.replace(found, tokens=("<b>", *found.tokens[1:]))
    named.write_html(tmp_path / "a.html", 3)
    html = (tmp_path / "a.html").read_text()
    assert "<b></th>" not in html and "&lt;b&gt;</th>" in html
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    cells = json.loads(re.search(r"cells = (.*);", html)[1])
    parts = found.parts["beside"]
    here = np.flatnonzero(parts.token_N == 5)
    first = here[np.abs(parts.part_N[here]).argmax()]
    assert cells[1][5][0][0] == parts.latent_N[first]
    np.testing.assert_allclose(cells[1][5][0][1:], (parts.activation_N[first], parts.part_N[first]))


@browser.needs_chromium
def test_a_browser_lists_the_latents_of_a_clicked_token(found, tmp_path):
    found.write_html(tmp_path / "a.html")
    (place,) = (number for number, name in enumerate(found.parts) if name == "beside")
    html = browser.dump(tmp_path / "a.html", then=browser.click(f'[data-sae="{place}"][data-token="5"]'))
    assert f'beside on "{found.tokens[5]}"' in html
    table = re.search(r'<table id="latents">(.*?)</table>', html, re.DOTALL)[1]
    expected = [(latent, f"{part:+.4f}") for latent, _, part in found.parts["beside"].strongest(5, 12)]
    assert [
        (int(latent), part.replace("\u2212", "-"))
        for latent, part in re.findall(r"<tr><td>(\d+)</td><td>[^<]*</td><td>([^<]*)</td>", table)
    ] == expected


@browser.needs_chromium
def test_the_page_does_not_scroll_sideways(found, ablated, tmp_path):
    named = {f"{name}_{'long_name_' * 9}": parts for name, parts in found.parts.items()}
    pictures = {"ablated": plotting.png(ablated.figure())}
    dataclasses.replace(found, parts=named).write_html(tmp_path / "a.html", 3, pictures)
    assert browser.beyond(tmp_path / "a.html") == 0


def command(**options):
    analysis_lib.attribute(**{"path": "run", "top": 3} | options)


def test_the_command_writes_the_requested_files(scope, found, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(analysis, "open_scope", lambda path, **_: scope)
    command(prompt=TEXT, ablate=24, html=tmp_path / "a.html", png=tmp_path / "a.png")
    shown = capsys.readouterr().out
    assert f"{found.metric:.3f}" in shown and "Spearman" in shown
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "Compared with ablation" in (tmp_path / "a.html").read_text()
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (TEXT, "bread and law"))
    )
    command(prompts=tmp_path / "texts.jsonl", ablate=24, png=tmp_path / "b.png")
    shown = capsys.readouterr().out
    pooled = analysis.ablations_of_prompts(scope, [TEXT, "bread and law"], 24)
    assert f"{pooled.correlation().pearson:.3f}" in shown
    apart = sorted(pooled.correlation(prompt=number).spearman for number in range(2))
    assert re.search(rf"range over 2 prompts .* {apart[0]:.3f} to {apart[1]:.3f}\n", shown)
    assert (tmp_path / "b.png").exists()
    command(prompt=TEXT, sae="beside")
    shown = capsys.readouterr().out
    assert "beside" in shown and "resid" not in shown and "SAE" in shown
    with pytest.raises(ValueError, match="there is no SAE 'other'"):
        command(prompt=TEXT, sae="other")


def test_parts_do_not_depend_on_the_number_of_tokens_at_a_time(scope, found, monkeypatch):
    monkeypatch.setattr(gradients_lib, "_DENSE", 64 * 4)
    got = analysis.attribute(scope, TEXT)
    for name, parts in found.parts.items():
        for part, expected in zip(got.parts[name], parts, strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)


def test_ablation_is_refused_where_no_latent_fires(tiny_gemma):
    silent = SUBJECTS["resid"].sae.replace(threshold=np.full(64, 1e9, np.float32))
    scope = scopes.make(tiny_gemma, {"silent": attached.Subject(silent, RESID, None)})
    found = analysis.attribute(scope, TEXT)
    found.show()
    with pytest.raises(ValueError, match=f"no latent fires on '{TEXT}'"):
        analysis.ablations(scope, found)


def test_names_are_drawn_as_text(found, capsys):
    parts = {r"$\q$ [/]": next(iter(found.parts.values()))}
    named = dataclasses.replace(found, parts=parts, answer=(1, r"$\q$"))
    assert plotting.png(named.figure()).startswith(b"\x89PNG")  # As mathematics, the name would raise.
    named.show()
    assert r"$\q$ [/]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a prompt or --prompts=FILE"),
        ({"prompts": "x", "prompt": "x"}, "give either a prompt or --prompts=FILE"),
        ({"prompts": "x"}, "--prompts needs --ablate=N"),
        (
            {"prompt": "x", "integrated": True},
            "--integrated takes one SAE; choose it with --sae from resid, beside",
        ),
    ],
)
def test_conflicting_options_are_refused(scope, monkeypatch, options, message):
    monkeypatch.setattr(analysis, "open_scope", lambda path, **_: scope)
    with pytest.raises(ValueError, match=message):
        command(**options)
