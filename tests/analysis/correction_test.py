"""A behaviour with and without latents, against a slow Gemma with the site replaced; and the command."""

import dataclasses
import json
import re
import sys

import compilations
import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.analysis.contrasts import correction
from gemma_scope_jax.cli import main as command
from gemma_scope_jax.data import batching, sources, token_rows
from gemma_scope_jax.display import plotting
from gemma_scope_jax.evaluation import metrics
from gemma_scope_jax.models import forward, interventions, masking, predictions
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached
from gemma_scope_jax.training import loop

STREAM, MLP = Site("resid_post", 1), Site("mlp_out", 2)
WORDS = "ash elm oak fir yew bay fig box gum ivy".split()
FIRST = [f"rivers of {word}" for word in WORDS]
SECOND = [f"{word} and law!" for word in WORDS]
# All have one length, since the slow Gemma is compiled for each length.
NEW_FIRST = ["rivers of sun", "rivers of ice"]
NEW_SECOND = ["wood and law!", "iron and law!", "gold and law!"]


@pytest.fixture(scope="module")
def scope(tiny_gemma, rows):
    subjects = {
        "stream": attached.Subject(random_sae(0), STREAM, None),
        "mlp": attached.Subject(random_sae(1), MLP, None),
    }
    return scopes.make(tiny_gemma, subjects, held_out=rows)


@pytest.fixture(scope="module")
def found(scope):
    return analysis.contrast(scope, FIRST, SECOND)


@pytest.fixture(scope="module")
def rows():
    return tiny.tokens(9, 24, special=0.05)


@pytest.fixture(scope="module")
def corrected(scope, found):
    before = compilations.so_far("written")
    made = analysis.correct(
        scope, found, "x", "y", NEW_FIRST, NEW_SECOND, top=13, random_sets=7, seed=1, rows=5
    )
    # One program for prompts and one for rows of text, whichever latents are ablated.
    assert 0 < compilations.so_far("written") - before <= 2
    return made


def slow_final(scope, tokens_1xL, ablated):
    """The stream after the last block, with the latents removed from their sites in float64."""
    write = {}
    for name in {name for name, _ in ablated}:
        subject = scope.subjects[name]

        def without(y, name=name, subject=subject.sae):
            pre = np.float64(y[0]) @ np.float64(subject.W_enc) + subject.b_enc
            f_LxM = np.where(pre > subject.threshold, np.maximum(pre, 0), 0)
            f_LxM[np.isin(tokens_1xL[0], [masking.BOS, masking.EOS, masking.PAD])] = 0
            gone = [latent for of, latent in ablated if of == name]
            return jnp.asarray(np.float64(y) - f_LxM[:, gone] @ np.float64(subject.W_dec)[gone], jnp.float32)

        write[subject.site] = without
    loaded = scope.gemma
    x = forward.embed(loaded, tokens_1xL)
    return forward.run_blocks(loaded, x, tokens_1xL, range(4), write=write)[0]


def slow_behaviour(scope, prompt, ablated=()):
    tokens = jnp.asarray([[masking.BOS, *tiny.encode(prompt)]])
    logits = predictions.logits(scope.gemma, slow_final(scope, tokens, ablated)[0, -1])
    return float(logits[tiny.encode("x")[0]] - logits[tiny.encode("y")[0]])


def test_a_behaviour_is_a_difference_of_logits_after_each_prompt(scope):
    prompts = ["q", *NEW_SECOND, "rivers of sun"]
    expected = [slow_behaviour(scope, prompt) for prompt in prompts]
    np.testing.assert_allclose(analysis.behaviour(scope, prompts, "x", "y"), expected, atol=1e-4)
    np.testing.assert_allclose(
        analysis.behaviour(scope, prompts, "y", "x"), [-value for value in expected], atol=1e-4
    )


def test_ablation_equals_gemma_with_the_sites_replaced(scope, found, corrected):
    assert corrected.latents == tuple(found.found()[:13])
    assert {name for name, _ in corrected.latents} == {"stream", "mlp"}
    for outcome, ablated in ((corrected.clean, ()), (corrected.ablated, corrected.latents)):
        for values, prompts in ((outcome.first_A, NEW_FIRST), (outcome.second_B, NEW_SECOND)):
            expected = [slow_behaviour(scope, prompt, ablated) for prompt in prompts]
            np.testing.assert_allclose(values, expected, atol=2e-4)
    means = [
        np.mean([slow_behaviour(scope, p, corrected.latents) for p in of]) for of in (NEW_FIRST, NEW_SECOND)
    ]
    np.testing.assert_allclose(corrected.ablated.gap, means[0] - means[1], atol=2e-4)
    assert abs(corrected.change) > 0.01


def test_the_damage_equals_gemma_with_the_sites_replaced(scope, corrected, rows):
    chosen = token_rows.order(9, batching.ORDER_SEED, 0, 5)
    deltas, counts = [], []
    for tokens_L in rows[chosen]:
        tokens = jnp.asarray(tokens_L[None])
        sums = []
        for ablated in ((), corrected.latents):
            final = slow_final(scope, tokens, ablated)
            loss, scored = predictions.next_token_loss(scope.gemma, final, tokens)
            sums.append(float((loss * scored).sum()))
        deltas.append(sums[1] - sums[0])
        counts.append(float(scored.sum()))
    expected, se = metrics.ratio(np.array(deltas), np.array(counts))
    np.testing.assert_allclose(corrected.ablated.delta_loss, expected, atol=1e-4)
    np.testing.assert_allclose(corrected.ablated.delta_loss_se, se, atol=1e-4)
    measured = [one.delta_loss is not None for one in corrected.random]
    assert measured == [True] * correction.DAMAGE_SETS + [False] * 2


def test_a_chat_template_in_text_is_left_unchanged(scope, found, corrected):
    config = scope.config
    chat = dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=True))
    scope = dataclasses.replace(scope, config=chat)
    first = masking.masked_prefix(chat.data)
    write = correction._write(scope, {"stream": [1, 2]}, 0, first)
    x = jnp.asarray(np.random.default_rng(0).normal(scale=9, size=(1, 12, 32)), jnp.float32)
    tokens = jnp.asarray([[masking.BOS, *range(10, 21)]])
    (changed,) = (write[STREAM](x, interventions.Where(tokens, jnp.arange(12)[None], tokens > 0, {})),)
    differs = np.flatnonzero(np.abs(np.asarray(changed - x)).max(-1)[0])
    assert first == 3 and differs.min() > first
    given = dict(
        answer="x", against="y", first=NEW_FIRST, second=NEW_SECOND, top=13, random_sets=1, seed=1, rows=5
    )
    made = analysis.correct(scope, found, **given)
    # Prompts have no template, so the gap stays; the loss on text changes, since its template is spared.
    np.testing.assert_allclose(made.ablated.gap, corrected.ablated.gap, atol=1e-5)
    assert made.ablated.delta_loss != corrected.ablated.delta_loss


def test_random_sets_match_the_latents_found_in_number_and_strength(scope, found):
    latents = found.latents("stream")[:5]
    strength_M = correction._strength(scope, found, "stream")
    norms = np.linalg.norm(np.float64(scope.subjects["stream"].sae.W_dec), axis=1)
    np.testing.assert_allclose(strength_M, found.of["stream"].activation_M * norms)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return correction._alike(strength_M, found, "stream", latents, 40, rng)

    sets = draw(0)
    others = set(np.flatnonzero(strength_M > 0)) - set(found.latents("stream"))
    for one in sets:
        assert len(set(one)) == 5 and set(one) <= others
    # Each latent replaces the one at its place. It is among the nearest of those left;
    # at worst, all drawn before it were nearer.
    for place, latent in enumerate(latents):
        distance = {i: abs(np.log(strength_M[i] / strength_M[latent])) for i in others}
        nearest = sorted(distance, key=distance.get)[: correction.NEAREST + 4]
        assert {one[place] for one in sets} <= set(nearest)
        assert len({one[place] for one in sets}) > 3
    assert sets == draw(0) != draw(1)
    with pytest.raises(ValueError, match=r"only \d+ other latents of stream fire .* set top to \d+ or less"):
        correction._alike(strength_M, found, "stream", [latents[0]] * 64, 1, np.random.default_rng(0))


def outcome(first, second, **others):
    return correction.Outcome(np.array(first, float), np.array(second, float), 1.0, **others)


def test_gaps_and_their_errors_by_hand(tmp_path):
    clean, ablated = outcome([3, 5], [0, 1, 2]), outcome([2, 2], [1, 1, 1])
    random = (outcome([3, 4], [0, 1, 2]), outcome([0, 0], [1, 1, 1]), outcome([1, 1], [3, 3, 3]))
    made = correction.Correction("x", "y", False, (("a", 1),), clean, ablated, random)
    assert (clean.gap, ablated.gap, made.change) == (3, 1, -2)
    # The variances are 2 and 1 over 2 and 3 prompts; the changes −1, −3 and 1, 0, −1 have the same variances.
    np.testing.assert_allclose([made.gap_se, made.change_se], np.sqrt(2 / 2 + 1 / 3))
    # With random sets the gap is 2.5, −1 and −2: narrower by 0.5, 2 and 1. The latents found narrow it by 2.
    assert made.as_good == 1
    assert "the gap from 3.000 to 1.000, 33% of it. 1 of 3 random sets" in made.about()
    assert "(p = 0.5)" in made.about()
    few = correction.Correction(
        "[/]", "$\\q$", False, (("a", 1),), outcome([3], [0, 1]), outcome([1], [0, 1]), random
    )
    few.write_json(tmp_path / "few.json")  # One prompt has no standard error.
    assert json.loads((tmp_path / "few.json").read_text())["gap_se"] is None
    few.show()
    plotting.png(few.figure())
    pairs = correction.Correction("x", "y", True, (), outcome([3, 5], [0, 1]), outcome([2, 2], [1, 1]), ())
    np.testing.assert_allclose(pairs.gap_se, np.std([3, 4], ddof=1) / np.sqrt(2))
    np.testing.assert_allclose(pairs.change_se, np.std([-2, -3], ddof=1) / np.sqrt(2))


def test_it_shows_and_writes_the_results(corrected, tmp_path, capsys):
    corrected.show()
    shown = capsys.readouterr().out
    assert "logit of 'x' minus that of 'y'" in shown and corrected.about() in " ".join(shown.split())
    assert re.search(rf"gap .* {corrected.ablated.gap:.3f} ", shown), shown
    changes = [one.gap - corrected.clean.gap for one in corrected.random]
    losses = [one.delta_loss for one in corrected.random[:5]]
    assert re.search(rf"change .*{re.escape(f'{np.mean(changes):+.3f}')}\n", shown), shown
    assert f"{min(changes):+.3f} to {max(changes):+.3f}" in shown
    assert re.search(rf"{corrected.ablated.delta_loss:.4f} ± .* {np.mean(losses):.4f} \(of 5\)", shown), shown
    (axis,) = corrected.figure().axes
    (cloud,) = axis.collections[:1]
    np.testing.assert_allclose(cloud.get_offsets()[:, 0], [one.gap for one in corrected.random])
    marked = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(marked, [corrected.clean.gap, corrected.ablated.gap])
    corrected.write_json(tmp_path / "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["latents"] == [list(one) for one in corrected.latents]
    assert stored["ablated"]["first"] == corrected.ablated.first_A.tolist()
    assert stored["ablated"]["gap"] == corrected.ablated.gap and len(stored["random"]) == 7


def test_halves_hold_each_prompt_once_and_keep_pairs():
    (first_a, second_a), (first_b, second_b) = analysis.halves(FIRST, SECOND[:7])
    assert (len(first_a), len(first_b), len(second_a), len(second_b)) == (5, 5, 4, 3)
    assert sorted(first_a + first_b) == sorted(FIRST) and sorted(second_a + second_b) == sorted(SECOND[:7])
    assert first_a != FIRST[:5] and analysis.halves(FIRST, SECOND, seed=1) != analysis.halves(FIRST, SECOND)
    for first, second in analysis.halves(FIRST, SECOND, is_paired=True):
        assert [FIRST.index(one) for one in first] == [SECOND.index(one) for one in second]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": " she"}, r"' she' is 4 tokens \(' ' \+ 's' \+ 'h' \+ 'e'\); give a text of one token"),
        ({"against": ""}, "'' is 0 tokens"),
        ({"first": [*NEW_FIRST, FIRST[3]]}, "latents were chosen on the prompt 'rivers of fir'"),
        ({"second": []}, "there are 2 and 0 prompts to measure"),
        ({"top": 0}, "top is 0; it must be at least 1"),
        ({"random_sets": 0}, "random_sets is 0; it must be at least 1"),
        ({"rows": -1}, "rows is -1; it must be at least 0"),
    ],
)
def test_invalid_arguments_are_refused(scope, found, change, message):
    given = {"answer": "x", "against": "y", "first": NEW_FIRST, "second": NEW_SECOND} | change
    with pytest.raises(ValueError, match=message):
        analysis.correct(scope, found, **given)


def test_the_command_audits_a_run(inputs, tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    loop.train(tiny.run_config(inputs), run)
    trees = [*WORDS, *(word[::-1] for word in WORDS)]
    (tmp_path / "a.txt").write_text("\n\n".join(f"rivers of {word}" for word in trees) + "\n")
    lines = [json.dumps({"text": f"{word} and law!"}) for word in trees]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))

    def main(*flags):
        files = (f"--first={tmp_path / 'a.txt'}", f"--second={tmp_path / 'b.jsonl'}")
        monkeypatch.setattr(sys, "argv", ["gemma_scope_jax", "contrast", str(run), *files, *flags])
        command.run(sys.argv[1:])
        return capsys.readouterr().out

    shown = main("--answer=x", "--against=y", "--top=2", "--seed=3", f"--out={out}")
    stored = json.loads((out / "contrast.json").read_text())
    after = json.loads((out / "correction.json").read_text())
    assert (out / "contrast.png").read_bytes().startswith(b"\x89PNG")
    assert (len(stored["first"]), len(after["clean"]["first"]), len(after["random"])) == (10, 10, 20)
    halves = analysis.halves(
        *(sources.read_prompts(tmp_path / name) for name in ("a.txt", "b.jsonl")), seed=3
    )
    assert (stored["first"], stored["second"]) == tuple(map(list, halves[0]))
    assert f"the gap from {after['clean']['gap']:.3f} to {after['ablated']['gap']:.3f}" in shown
    assert after["ablated"]["delta_loss"] is not None and f"Wrote {out}" in shown
    # Without an answer, all prompts are contrasted and nothing is ablated or written.
    shown = main("--at=last", "--paired")
    assert re.search(r"latents separate the sets\s+\(20 pairs\)", shown) and "gap" not in shown
    # At this low rate no latent is found; the gap is still shown.
    shown = main("--answer=x", "--against=y", "--rate=0.00005")
    assert "There are no latents to ablate" in shown and "a gap of" in shown
    for flags, message in (
        (("--answer=x",), "--answer and --against must be given together"),
        (("--top=3",), "--top, the number of latents to ablate"),
        ((f"--out={tmp_path / 'a.txt'}",), "is a file; give a folder"),
        ((f"--out={out}",), "already exists"),
        (("--answer=xx", "--against=y"), "'xx' is 2 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            main(*flags)
