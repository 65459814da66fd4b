"""Edits of latents in Gemma, compared with slow NumPy at the site."""

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scopes
import tiny
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.analysis import session as scope_lib
from gemma_scope_jax.analysis.steering import edits
from gemma_scope_jax.models import forward, generation, interventions, masking, passes, predictions
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import attached

RESID, MLP, EMBED = Site("resid_post", 1), Site("mlp_out", 2), Site("embed", 0)
READ = Site("mlp_in", 2)
SUBJECTS = {
    "resid": attached.Subject(random_sae(0), RESID, None),
    "beside": attached.Subject(random_sae(1), RESID, None),
    "mlp": attached.Subject(random_sae(2), MLP, None),
    "embed": attached.Subject(random_sae(3), EMBED, None),
    "transcoder": attached.Subject(random_sae(4), READ, None, MLP),
    "input": attached.Subject(random_sae(5), READ, None),
}
PROMPT = [masking.BOS, *tiny.encode("rivers of bread")]


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    return scopes.make(tiny_gemma, SUBJECTS)


def run(scope, made, tokens=PROMPT, read=()):
    """The stream after the last block and the sites read, without padding."""
    loaded = scope.gemma
    placed = scope_lib.place_prompts(scope, [tokens])
    write = edits.writes(scope, made) if isinstance(made, list) else made
    stream, values = passes.written(loaded, placed, write, read)
    return jax.tree.map(lambda value: np.asarray(value[0, : len(tokens)]), (stream, values))


def latents(name, x_LxD):
    """The latents in float64."""
    subject = SUBJECTS[name].sae
    pre = np.float64(x_LxD) @ np.float64(subject.W_enc) + subject.b_enc
    return np.where(pre > subject.threshold, np.maximum(pre, 0), 0)


def firing(scope, name):
    """The activations [L, M], and the latent that fires most often on the prompt."""
    site = SUBJECTS[name].site
    f_LxM = latents(name, run(scope, {}, read=(site,))[1][site])
    f_LxM[0] = 0
    return f_LxM, int((f_LxM > 0).sum(0).argmax())


@pytest.mark.parametrize("name", SUBJECTS)
def test_latents_that_keep_their_values_change_no_logit(scope, name):
    f_LxM, latent = firing(scope, name)
    loaded, subject, token = scope.gemma, SUBJECTS[name], int(f_LxM[:, latent].argmax())
    clean, values = run(scope, {}, read=(subject.site, subject.spliced))

    def logits(made):
        return predictions.logits(loaded, run(scope, made)[0])

    # Equal bit for bit at the site; later values have another program's rounding.
    tokens = jnp.asarray([PROMPT])
    passed = {site: value[None] for site, value in values.items()}
    where = interventions.Where(
        tokens, masking.packed_positions(tokens), jnp.full(tokens.shape, True), passed
    )
    expected = predictions.logits(loaded, clean)
    for made in ([analysis.scale(name, latent, 1.0)], [analysis.add(name, latent, 0.0)]):
        y_SxLxO = edits.writes(scope, made)[subject.spliced](passed[subject.spliced], where)
        np.testing.assert_array_equal(y_SxLxO[0], values[subject.spliced])
        np.testing.assert_allclose(logits(made), expected, atol=1e-5)
    measured = analysis.clamp(name, latent, f_LxM[token, latent], range(token - 1, token))
    np.testing.assert_allclose(logits([measured]), expected, atol=1e-4)
    twice = analysis.clamp(name, latent, 2 * f_LxM[token, latent], range(token - 1, token))
    assert np.abs(logits([twice]) - expected).max() > 1e-3


@pytest.mark.parametrize("name", SUBJECTS)
def test_edits_equal_slow_numpy(scope, name):
    f_LxM, latent = firing(scope, name)
    often = (f_LxM > 0).sum(0)
    other = int(np.where(np.arange(64) == latent, -1, often).argmax())
    subject = SUBJECTS[name]
    made = [analysis.ablate(name, latent), analysis.Edit(name, other, 3.0, 0.5, range(2, 6))]
    (y,) = run(scope, {}, read=(subject.spliced,))[1].values()
    f_new = f_LxM.copy()
    f_new[1:, latent] = 0
    f_new[3:7, other] = 3 * f_LxM[3:7, other] + 0.5
    expected = y + (f_new - f_LxM) @ np.float64(subject.sae.W_dec)
    write = {subject.spliced: lambda _: jnp.asarray(expected[None], jnp.float32)}
    loaded, tokens = scope.gemma, jnp.asarray([PROMPT])
    x = forward.embed(loaded, tokens)
    after = forward.run_blocks(loaded, x, tokens, range(4), write=write)[0]
    got, _ = run(scope, made)
    np.testing.assert_allclose(got, after[0], rtol=1e-4, atol=1e-4 * np.abs(after).max())


def test_tokens_before_the_first_edit_are_unchanged(scope):
    _, latent = firing(scope, "resid")
    clean, _ = run(scope, {})
    got, _ = run(scope, [analysis.add("resid", latent, 5.0, range(4, 6))])
    np.testing.assert_allclose(got[:5], clean[:5], atol=1e-5)  # Up to another program's rounding.
    assert (np.abs(got[5:] - clean[5:]).max(1) > 1e-3).all()


def test_edits_at_one_site_add_up(scope):
    both = [analysis.add("resid", 3, 2.0), analysis.add("beside", 5, -1.0)]
    added = 2 * np.asarray(SUBJECTS["resid"].sae.W_dec[3]) - np.asarray(SUBJECTS["beside"].sae.W_dec[5])
    write = edits.writes(scope, both)
    loaded, tokens = scope.gemma, jnp.asarray([PROMPT])
    x = forward.embed(loaded, tokens)
    ones = jnp.full(tokens.shape, True)
    bound = interventions.at(write, tokens, masking.packed_positions(tokens), ones)
    changed = forward.run_blocks(loaded, x, tokens, range(2), write=bound)[0]
    clean = forward.run_blocks(loaded, x, tokens, range(2))[0]
    np.testing.assert_allclose((changed - clean)[0, 1:], np.tile(added, (len(PROMPT) - 1, 1)), atol=1e-4)


def test_a_transcoder_reads_its_edited_input(scope):
    x, y = (value[None] for value in run(scope, {}, read=(READ, MLP))[1].values())
    tokens = jnp.asarray([PROMPT])
    passed = {}
    where = interventions.Where(
        tokens, masking.packed_positions(tokens), jnp.full(tokens.shape, True), passed
    )
    write = edits.writes(scope, [analysis.add("input", 0, 9.0), analysis.ablate("transcoder", 2)])
    passed[READ] = write[READ](x, where)
    moved = np.float64(x[0])
    moved[1:] += 9 * np.float64(SUBJECTS["input"].sae.W_dec[0])
    f_L = latents("transcoder", moved)[1:, 2]
    assert (f_L > 0).any() and (f_L != latents("transcoder", x[0])[1:, 2]).any()
    expected = np.float64(y[0])
    expected[1:] -= f_L[:, None] * np.float64(SUBJECTS["transcoder"].sae.W_dec[2])
    np.testing.assert_allclose(write[MLP](y, where)[0], expected, atol=1e-4)


def test_special_tokens_are_never_changed(scope):
    tokens = jnp.asarray([[masking.BOS, 70, masking.EOS, 71, masking.BOS, 72, masking.PAD]])
    where = interventions.Where(tokens, masking.packed_positions(tokens), jnp.full(tokens.shape, True), {})
    write = edits.writes(scope, [analysis.add("resid", 3, 2.0)])
    changed = write[RESID](jnp.zeros((1, 7, 32)), where)
    assert np.flatnonzero(np.abs(changed[0]).max(1)).tolist() == [1, 3, 5]


def test_rows_can_have_different_edits(scope):
    _, latent = firing(scope, "resid")
    subject = SUBJECTS["resid"].sae
    per_row = edits.stack_edits(
        subject, [latent, 7], np.array([[1, 1], [0, 1], [1, 1]]), np.array([[0, 0], [0, 0], [0, 2]])
    )
    placed = scope_lib.place_prompts(scope, [PROMPT] * 3)
    write = edits.writes_of_saes(scope, {"resid": per_row})
    got, _ = passes.written(scope.gemma, placed, write)
    for row, made in zip(
        got, ([], [analysis.ablate("resid", latent)], [analysis.add("resid", 7, 2.0)]), strict=True
    ):
        np.testing.assert_allclose(row[: len(PROMPT)], run(scope, made)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", ["all", "prompt", "reply", range(3, 18)])
def test_generation_with_edits_equals_running_everything_again(scope, tokens):
    _, latent = firing(scope, "resid")
    made = [analysis.clamp("resid", latent, 6.0, tokens), analysis.add("transcoder", 2, 4.0, tokens)]
    write = edits.writes(scope, made)
    (reply,) = generation.generate(scope.gemma, [PROMPT], 6, temperature=0, write=write)
    clean = generation.generate(scope.gemma, [PROMPT], 6, temperature=0)[0]
    # Tokens still to come are PAD, which no earlier token sees, so all passes have one length.
    tokens_1xL = np.array([[*PROMPT, *[masking.PAD] * len(reply)]], np.int32)
    index = jnp.arange(tokens_1xL.size)[None]
    for place in range(len(PROMPT), tokens_1xL.size):
        tokens = jnp.asarray(tokens_1xL)
        bound = interventions.at(write, tokens, index, index < len(PROMPT))
        x = forward.embed(scope.gemma, tokens)
        x, _ = forward.run_blocks(scope.gemma, x, tokens, range(4), write=bound)
        tokens_1xL[0, place] = predictions.logits(scope.gemma, x[:, place - 1]).argmax()
    assert reply == tokens_1xL[0, len(PROMPT) :].tolist()
    assert reply != clean


def test_other_values_do_not_recompile(scope):
    run(scope, [analysis.clamp("resid", 1, 2.0), analysis.ablate("transcoder", 2)])
    compiled = compilations.so_far("written")
    run(scope, [analysis.add("resid", 9, 1.0, "prompt"), analysis.scale("transcoder", 4, 3.0, range(2))])
    assert compilations.so_far("written") == compiled


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([analysis.ablate("other", 1)], "there is no SAE 'other'; choose from resid"),
        ([analysis.ablate("resid", 64)], "resid has no latent 64; its latents are 0 to 63"),
        ([analysis.ablate("resid", 1), analysis.add("resid", 1, 2.0)], "latent 1 of resid is edited twice"),
        (
            [analysis.ablate("resid", 1, "answer")],
            "the tokens of an edit are 'answer'; give a range or one of",
        ),
        ([analysis.ablate("resid", 1, range(-1, 2))], "give a range with step 1 and a start of 0"),
        ([analysis.ablate("resid", 1, range(5, 2))], "tokens of an edit are 5:2"),
        ([analysis.clamp("resid", 1, float("inf"))], "the added value of an edit is inf"),
        ([analysis.scale("resid", 1, float("nan"))], "the scale of an edit is nan"),
    ],
)
def test_invalid_edits_are_refused(scope, made, message):
    with pytest.raises(ValueError, match=message):
        edits.writes(scope, made)
