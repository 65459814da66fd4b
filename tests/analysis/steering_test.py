"""Steering, compared with slow NumPy and generation by hand; and the edit syntax of the command line."""

import dataclasses
import io
import pathlib
import re

import browser
import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.analysis.steering import edit_syntax, edits
from gemma_scope_jax.cli.commands import analysis as analysis_lib
from gemma_scope_jax.models import forward, generation, masking, predictions
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.saes import attached

RESID, READ, MLP = Site("resid_post", 1), Site("mlp_in", 2), Site("mlp_out", 2)
SUBJECTS = {
    "resid": attached.Subject(random_sae(0), RESID, None),
    "transcoder": attached.Subject(random_sae(4), READ, None, MLP),
    "input": attached.Subject(random_sae(5), READ, None),
}
TOKENS = tiny.tokens(5, 24, seed=3, special=0.05)  # In batches of 4, the second batch is padded.
COUNTED = np.array(TOKENS > 2)


def make_scope(tiny_gemma, mesh):
    loaded = dataclasses.replace(
        tiny_gemma, params=jax.device_put(tiny_gemma.params, jax.NamedSharding(mesh, sharding.REPLICATED))
    )
    return scopes.make(loaded, SUBJECTS, mesh, held_out=TOKENS)


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    return make_scope(tiny_gemma, sharding.one_device())


@pytest.fixture(scope="module")
def values(tiny_gemma):
    """The activations of all rows, in float64."""
    found = forward.read_sites(tiny_gemma, jnp.asarray(TOKENS), [RESID, READ, MLP])
    return {site: np.float64(value) for site, value in found.items()}


def latents(name, values):
    """The latents [S, L, M], with zeros at tokens that do not count."""
    subject = SUBJECTS[name]
    pre = values[subject.site] @ np.float64(subject.sae.W_enc) + subject.sae.b_enc
    return np.where((pre > subject.sae.threshold) & COUNTED[..., None], np.maximum(pre, 0), 0)


def often(name, values):
    """The latent that fires most often."""
    return int((latents(name, values) > 0).sum((0, 1)).argmax())


def test_activity_equals_slow_numpy(scope, values):
    found = analysis.activity(scope)
    assert list(found) == list(SUBJECTS)
    for name, one in found.items():
        f_BxM = latents(name, values)[COUNTED]
        fires_M = (f_BxM > 0).sum(0)
        np.testing.assert_allclose(one.frequency_M, fires_M / COUNTED.sum(), rtol=1e-6)
        np.testing.assert_allclose(one.mean_M, f_BxM.sum(0) / np.maximum(fires_M, 1), rtol=1e-4)
        np.testing.assert_allclose(one.largest_M, f_BxM.max(0), rtol=1e-4)
        assert one.rows == len(TOKENS)
    latent = often("resid", values)
    typical = analysis.typical(scope, "resid", latent)
    np.testing.assert_allclose(typical, found["resid"].mean_M[latent], rtol=1e-6)


def test_a_latent_that_never_fired_has_no_typical_activation(scope):
    subject = SUBJECTS["resid"]
    threshold = np.where(np.arange(64) == 5, 1e9, subject.sae.threshold)
    silenced = dataclasses.replace(subject, sae=subject.sae.replace(threshold=threshold))
    scope = scopes.make(scope.gemma, {"resid": silenced}, held_out=TOKENS)
    one = analysis.activity(scope, 3)["resid"]
    assert one.frequency_M[5] == one.mean_M[5] == one.largest_M[5] == 0 < one.frequency_M[4]
    with pytest.raises(ValueError, match="latent 5 of resid never fires on 3 held-out rows"):
        analysis.typical(scope, "resid", 5, 3)


def test_invalid_arguments_of_activity_are_refused(scope):
    with pytest.raises(ValueError, match="rows is 0"):
        analysis.activity(scope, 0)
    with pytest.raises(ValueError, match="there is no SAE 'other'"):
        analysis.activity(scope, names=["other"])
    with pytest.raises(ValueError, match="this scope has no held-out text"):
        analysis.activity(dataclasses.replace(scope, held_out=analysis.Scope.held_out))


def log_softmax(tiny_gemma, site, value):
    """The log-probabilities [S, L, V] in float64, with a site replaced by a value."""
    tokens = jnp.asarray(TOKENS)
    write = {site: lambda _: jnp.asarray(value, jnp.float32)}
    x = forward.run_blocks(tiny_gemma, forward.embed(tiny_gemma, tokens), tokens, range(4), write=write)[0]
    logits = np.float64(predictions.logits(tiny_gemma, x))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("name", "kind", "tokens"), [("resid", "add", None), ("transcoder", "clamp", ["a", "s", " "])]
)
def test_a_sweep_equals_slow_numpy(scope, values, tiny_gemma, name, kind, tokens):
    subject, latent = SUBJECTS[name], often(name, values)
    by = (-2.0, 0.0, 3.0)
    found = analysis.sweep(scope, name, latent, by, kind, rows=100, tokens=tokens)
    f_SxL = latents(name, values)[..., latent]
    unit = f_SxL[f_SxL > 0].mean()
    W_dec_O = np.float64(subject.sae.W_dec[latent])
    y_SxLxO = values[subject.spliced]
    if tokens is None:
        normed = W_dec_O / np.sqrt(np.square(W_dec_O).mean() + 1e-6)
        final = tiny_gemma.params["final_norm"]["scale"]
        logits_V = np.float64(tiny_gemma.params["embedder"]["input_embedding"]) @ (
            normed * (1 + np.float64(final))
        )
        ids = np.argsort(-logits_V)[:10]
    else:
        ids = [tiny.encode(text)[0] for text in tokens]
    assert found.tokens == tuple(scope.tokenizer.decode([int(i)]) for i in ids)

    next_SxL = np.pad(TOKENS[:, 1:], ((0, 0), (0, 1)))
    scored_SxL = COUNTED & ~np.isin(next_SxL, (masking.PAD, masking.BOS))
    scored_SxL[:, -1] = False
    assert found.predictions == scored_SxL.sum() and found.rows == len(TOKENS)

    def measured(value):
        log_p = log_softmax(tiny_gemma, subject.spliced, value)
        loss_SxL = -np.take_along_axis(log_p, next_SxL[..., None], -1)[..., 0]
        return (np.where(scored_SxL, v, 0).sum(1) for v in (log_p[..., ids].mean(-1), loss_SxL))

    clean_chosen_S, clean_loss_S = measured(y_SxLxO)
    n_S = scored_SxL.sum(1)
    np.testing.assert_allclose(found.clean_loss, clean_loss_S.sum() / n_S.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.unit, unit, rtol=1e-4)
    for i, strength in enumerate(by):
        new_SxL = f_SxL + strength * unit if kind == "add" else np.full_like(f_SxL, strength * unit)
        change_SxL = np.where(COUNTED, new_SxL - f_SxL, 0)
        chosen_S, loss_S = measured(y_SxLxO + change_SxL[..., None] * W_dec_O)
        for got, got_se, sum_S in (
            (found.effect_N[i], found.effect_se_N[i], chosen_S - clean_chosen_S),
            (found.damage_N[i], found.damage_se_N[i], loss_S - clean_loss_S),
        ):
            mean = sum_S.sum() / n_S.sum()
            residual_S = (sum_S - mean * n_S) / n_S.sum()
            np.testing.assert_allclose(got, mean, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(
                got_se, np.sqrt(np.square(residual_S).sum() * 5 / 4), rtol=1e-3, atol=1e-5
            )
        assert (abs(found.damage_N[i]) > 1e-3) == (strength != 0 or kind == "clamp")


def test_zero_strength_changes_nothing_and_all_strengths_share_one_program(scope, values):
    latent = often("resid", values)
    found = analysis.sweep(scope, "resid", latent, (0.0,), rows=4)
    assert found.effect_N == found.damage_N == found.effect_se_N == found.damage_se_N == 0
    compiled = compilations.so_far("written", "likelihoods", "_written", "clean")
    other = analysis.sweep(scope, "resid", latent, (1.0, -3.0), rows=4, unit=2.5)
    assert compilations.so_far("written", "likelihoods", "_written", "clean") == compiled
    assert other.unit == 2.5 and (other.damage_N != 0).all()


def test_a_sweep_is_the_same_on_many_devices(scope, tiny_gemma, values):
    latent = often("resid", values)
    mesh = sharding.make_mesh(2, 4)
    asked = ("resid", latent, (0.0, 2.0), "add", 8, ["a"], 9.0)
    found, expected = analysis.sweep(make_scope(tiny_gemma, mesh), *asked), analysis.sweep(scope, *asked)
    assert found.damage_N[0] == found.effect_N[0] == 0 and found.predictions == expected.predictions
    for of in ("effect_N", "effect_se_N", "damage_N", "damage_se_N"):
        np.testing.assert_allclose(getattr(found, of), getattr(expected, of), rtol=1e-3, atol=1e-6)


def test_a_sweep_is_shown(scope, values, capsys):
    latent = often("resid", values)
    found = analysis.sweep(scope, "resid", latent, (-1.0, 0.0, 2.0), rows=4, tokens=["$", "<"], unit=2.5)
    found = dataclasses.replace(found, tokens=(r"$\q$", "<"))  # As mathematics, the token would raise.
    found.show()
    shown = capsys.readouterr().out
    assert (
        f"latent {latent} of resid: strength × 2.5 added to its activation" in shown
        and r"'$\\q$' '<'" in shown
    )
    assert f"{found.effect_N[2]:+.3f} ± {found.effect_se_N[2]:.3f}" in shown
    figure = found.figure()
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["-1", "0", "2"]
    np.testing.assert_array_equal(axis.lines[0].get_xydata(), np.stack([found.damage_N, found.effect_N], 1))
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "other"}, "there is no SAE 'other'"),
        ({"kind": "scale"}, "kind is 'scale'.*give one of add, clamp"),
        ({"strengths": ()}, "at least one row and strength"),
        ({"rows": 0}, "rows 0"),
        ({"tokens": ["bread"]}, r"'bread' is 5 tokens \('b' \+ 'r' \+ 'e' \+ 'a' \+ 'd'\)"),
        ({"tokens": [""]}, r"'' is 0 tokens \(none\)"),
        ({"name": "input"}, "input reconstructs layer_2_mlp_in, which is not added to the residual stream"),
    ],
)
def test_invalid_sweeps_are_refused(scope, arguments, message):
    with pytest.raises(ValueError, match=message):
        analysis.sweep(scope, **{"name": "resid", "latent": 1} | arguments)


PROMPTS = [
    "rivers & <bread>",
    "law",
    "a",
    "song",
]  # All tests have four replies, so nothing is recompiled.


@pytest.mark.parametrize(("temperature", "samples"), [(0.0, 1), (1.0, 2)])
def test_steering_equals_generation_by_hand(scope, values, temperature, samples):
    prompts = PROMPTS[: 4 // samples]
    changes = [
        analysis.clamp("resid", often("resid", values), 9.0),
        analysis.add("transcoder", 3, 8.0, "reply"),
    ]
    found = analysis.steer(scope, prompts, changes, 6, temperature, samples, seed=3)
    rows = [[masking.BOS, *tiny.encode(prompt)] for prompt in prompts for _ in range(samples)]
    stop = (masking.EOS, 261)
    for replies, write in ((found.clean, None), (found.changed, edits.writes(scope, changes))):
        by_hand = generation.generate(scope.gemma, rows, 6, temperature, 3, write, stop)
        texts = [scope.tokenizer.decode(reply[:-1] if reply[-1] in stop else reply) for reply in by_hand]
        assert [text for some in replies for text in some] == texts
        assert all(len(some) == samples for some in replies)
    assert found.clean != found.changed and found.prompts == tuple(prompts)
    kept = [analysis.scale("resid", 1, 1.0), analysis.add("transcoder", 1, 0.0)]
    same = analysis.steer(scope, prompts, kept, 6, temperature, samples, seed=3)
    assert same.changed == same.clean == found.clean


STEERED = analysis.Steered(
    "<tiny>", (analysis.add("a<b>", 3, 2.5, range(2, 4)),), ("say <b>", "[red]"),
    (("so & so", "[dim]x"), ("", "")), (("so <i>", "[dim]y"), ("", "[/]\n\na")), 0.7, 4,
)  # fmt: skip


def test_replies_are_shown_side_by_side_as_text(capsys, tmp_path):
    STEERED.show()
    shown = capsys.readouterr().out
    assert "a<b>:3+2.5@2:4" in shown and "[/]↵↵a" in shown and "say <b>" in shown and "[red]" in shown
    (line,) = [line for line in shown.splitlines() if "so & so" in line]
    assert line.index("so & so") < line.index("so <i>")
    STEERED.write_html(tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text()
    assert "<i>" not in html and "<b>" not in html and "<tiny>" not in html
    assert '<span class="alike">so </span>&lt;i&gt;' in html and "a&lt;b&gt;:3+2.5@2:4" in html
    assert "at temperature 0.7, seed 4" in html and "at temperature 0.7, seed 4" in shown
    assert not any(of in html for of in ("src=", "href=", "http"))


@browser.needs_chromium
def test_a_browser_shows_replies_side_by_side(tmp_path):
    STEERED.write_html(tmp_path / "a.html")
    measured = (
        "document.title = [...document.querySelectorAll('td')].slice(0, 2).map(c => c.offsetTop).join();"
    )
    html = browser.dump(tmp_path / "a.html", then=measured)
    left, right = re.search(r"<title>(\d+),(\d+)</title>", html).groups()
    assert left == right and "so </span>&lt;i&gt;" in html and "<i>" not in html
    long = dataclasses.replace(STEERED, model="long_name_" * 9, prompts=("word" * 99, "[red]"))
    long.write_html(tmp_path / "b.html")
    assert browser.beyond(tmp_path / "b.html") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["a", ""]}, "prompt 1 is empty"),
        ({"changes": []}, "there is no edit"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 2}, "more than one needs a temperature above 0"),
        ({"num_tokens": 0}, "num_tokens is 0"),
    ],
)
def test_invalid_steering_is_refused(scope, arguments, message):
    with pytest.raises(ValueError, match=message):
        analysis.steer(scope, **{"prompts": "a", "changes": [analysis.ablate("resid", 1)]} | arguments)


@pytest.mark.parametrize(
    ("text", "edit", "is_typical"),
    [
        ("layer_9:12=ablate", analysis.ablate("layer_9", 12), False),
        ("12*0.5", analysis.scale("", 12, 0.5), False),
        ("a:b:12*-1", analysis.scale("a:b", 12, -1.0), False),
        ("a:12+3t", analysis.add("a", 12, 3.0), True),
        ("a:12-.5@reply", analysis.add("a", 12, -0.5, "reply"), False),
        ("a:12+1e+06", analysis.add("a", 12, 1e6), False),
        ("a:12=2t@3:7", analysis.clamp("a", 12, 2.0, range(3, 7)), True),
        ("a:12=-t@prompt", analysis.clamp("a", 12, -1.0, "prompt"), True),
        ("12+t", analysis.add("", 12, 1.0), True),
        ("12=t", analysis.clamp("", 12, 1.0), True),
        ("a:12*2+3t@all", analysis.Edit("a", 12, 2.0, 3.0), True),
        ("a:12=0", analysis.ablate("a", 12), False),
    ],
)
def test_edits_are_parsed_and_survive_a_round_trip(text, edit, is_typical):
    assert edit_syntax.parse(text) == (edit, is_typical)
    assert edit_syntax.parse(edit_syntax.written(edit)).edit == edit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:b", "'b' does not start with the number of a latent; write it like NAME:12"),
        (":12=ablate", "does not start with"),
        ("a:12", "it names a latent but no change"),
        ("a:12=ablated", "'=ablated' is not a change such as =ablate,"),
        ("a:12+", r"'\+' is not a change"),
        ("a:12=", "'=' is not a change"),
        ("a:12*t", r"'\*t' is not a change"),
        ("a:12+3@answer", "'@answer' does not name tokens; use @prompt, @reply"),
        ("a:12+3@3", "'@3' does not name tokens"),
        ("3*1e400", r"the scale of an edit is inf; it must be at least -1e\+30 and at most 1e\+30"),
        ("3+1e39t", r"the added value of an edit is 1e\+39"),
        ("3+1@5:2", "tokens of an edit are 5:2; the end, .* must be 6 to 2,147,483,646"),
        ("3+1@5:5", "tokens of an edit are 5:5"),
        ("3+1@0:2147483647", "tokens of an edit are 0:2147483647"),
    ],
)
def test_invalid_edit_texts_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        edit_syntax.parse(text)


def test_typical_activations_are_measured_for_edits_that_use_them(scope, values):
    latent = often("resid", values)
    made = edit_syntax.resolve(
        scope, [edit_syntax.parse(f"resid:{latent}+3t"), edit_syntax.parse("transcoder:2+3")]
    )
    assert made[0].add == pytest.approx(3 * analysis.typical(scope, "resid", latent))
    assert made[1] == analysis.add("transcoder", 2, 3.0)
    with pytest.raises(
        ValueError, match=r"'2=ablate' has no SAE name; write NAME: .* resid, transcoder, input"
    ):
        edit_syntax.resolve(scope, [edit_syntax.parse("2=ablate")])
    with pytest.raises(ValueError, match="resid has no latent 64"):
        edit_syntax.resolve(scope, [edit_syntax.parse("resid:64+t")])
    only = dataclasses.replace(scope, subjects={"resid": SUBJECTS["resid"]})
    assert edit_syntax.resolve(only, [edit_syntax.parse("2=ablate")]) == [analysis.ablate("resid", 2)]


def test_the_command_steers_and_sweeps(scope, values, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(analysis, "open_scope", lambda path, **_: scope)
    latent = often("resid", values)
    edits = [f"resid:{latent}+2t@reply", "transcoder:3=ablate"]
    analysis_lib.steer("run", PROMPTS, edits, html=tmp_path / "a.html")
    unit = analysis.typical(scope, "resid", latent)
    assert f"resid:{latent}+{2 * unit:.6g}@reply" in (tmp_path / "a.html").read_text()
    assert "original" in capsys.readouterr().out
    asked = {"sweep": True, "strengths": (0.0, 2.0), "rows": 4, "png": tmp_path / "a.png"}
    analysis_lib.steer("run", edit=[f"resid:{latent}=2t"], **asked)
    shown = capsys.readouterr().out
    assert "replaces its activation" in shown and f"Wrote {tmp_path / 'a.png'}" in shown
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    expected = analysis.sweep(scope, "resid", latent, (0.0, 4.0), "clamp", rows=4)
    for effect, error in zip(expected.effect_N, expected.effect_se_N, strict=True):
        assert f"{effect:+.3f} ± {error:.3f}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edit": ["1+t"], "sweep": True, "prompts": ["a"]}, "a prompt cannot be combined with --sweep"),
        ({"edit": ["1+t"], "png": pathlib.Path("a.png"), "prompts": ["a"]}, "--png needs --sweep"),
        ({"edit": ["1+t"], "strengths": [1.0], "prompts": ["a"]}, "--strengths needs --sweep"),
        ({"edit": ["1+t"], "rows": 4, "prompts": ["a"]}, "--rows needs --sweep"),
        ({"edit": ["1+t"], "sweep": True, "chat": True}, "--chat cannot be combined with --sweep"),
        ({"edit": ["1+t"], "sweep": True, "samples": 2}, "--samples cannot be combined with --sweep"),
        ({"edit": ["1+t"], "sweep": True, "num_tokens": 3}, "--num-tokens cannot be combined with --sweep"),
        ({"edit": ["1+t"]}, "no prompt is given"),
        ({"edit": ["1+2"], "sweep": True}, r"--edit is 1\+2, but a sweep takes one latent at all tokens"),
        ({"edit": ["1+t", "2+t"], "sweep": True}, "a sweep takes one latent"),
        ({"edit": ["1+t@reply"], "sweep": True}, "a sweep takes one latent"),
    ],
)
def test_conflicting_options_are_refused_before_anything_is_opened(arguments, message):
    with pytest.raises(ValueError, match=message):
        analysis_lib.steer("run", **arguments)
