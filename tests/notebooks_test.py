"""The tutorials' notebooks run on Gemma 3 270M and find the latents planted in its SAE."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from toys import Rows

from benchmarks import notebooks
from gemma_scope_jax import analysis
from gemma_scope_jax import config as config_lib
from gemma_scope_jax.analysis import session
from gemma_scope_jax.data import sources
from gemma_scope_jax.models import forward, masking, placement, tokenizer
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.saes import jumprelu, loading, saving
from gemma_scope_jax.saes.formats import common

SITE, WIDTH = Site("resid_post", 9), 64
NAVY, WOMEN = 62, 63  # The last two latents; the others stand for tokens of the text.


def activations(loaded, rows):
    """The activations [N, D] of each row, without BOS."""
    padded = np.full((len(rows), max(map(len, rows))), masking.PAD, np.int32)
    for row_L, row in zip(padded, rows, strict=True):
        row_L[: len(row)] = row
    x_SxLxD = np.asarray(forward.read_sites(loaded, jnp.asarray(padded), [SITE])[SITE])
    return [x_LxD[1 : len(row)] for x_LxD, row in zip(x_SxLxD, rows, strict=True)]


def planted(loaded, encode, texts):
    """An SAE whose latents are directions from the mean to single activations, with thresholds half way there."""
    found = iter(activations(loaded, [[masking.BOS, *encode(one)][:64] for some in texts for one in some]))
    of_text, women, men, (navy,) = ([next(found) for _ in some] for some in texts)
    x_NxD = np.concatenate(of_text)
    mean_D = np.median(x_NxD, axis=0)
    length_N = np.linalg.norm(x_NxD - mean_D[None], axis=1)
    usual = np.flatnonzero(length_N < 3 * np.median(length_N))
    points = list(x_NxD[np.random.default_rng(0).choice(usual, NAVY, replace=False)] - mean_D[None])
    points.append(navy[-1] - mean_D)
    # " woman" minus " man": the activations at the second token of the prompts.
    women_AxD, men_BxD = (np.stack([x_LxD[1] for x_LxD in some]) for some in (women, men))
    points.append(women_AxD.mean(0) - men_BxD.mean(0))
    lengths = np.linalg.norm(points, axis=1)
    W_dec = np.stack(points) / lengths[:, None]
    b_enc, threshold = -W_dec @ mean_D, lengths / 2
    b_enc[WOMEN] = -(men_BxD @ W_dec[WOMEN]).max()
    threshold[WOMEN] = 0
    arrays = {"W_enc": W_dec.T, "b_enc": b_enc, "threshold": threshold, "W_dec": W_dec, "b_dec": mean_D}
    return jumprelu.SAE(**{name: np.float32(value) for name, value in arrays.items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs a notebook as after `make quickstart`; Gemma is loaded once for all notebooks."""
    folder = tmp_path_factory.mktemp("notebooks")
    texts = list(itertools.islice(sources.documents(config_lib.DEFAULT_TEXT), 24))
    encode = tokenizer.load("gemma3_270m", "", "").encode
    loaded = placement.load("gemma3_270m", "", jnp.float32)  # On one device: other tests cover meshes.
    people = ("woman", "girl", "mother", "queen"), ("man", "boy", "father", "king")
    prompts = [[f"The {word}" for word in words] for words in people]
    made = planted(loaded, encode, [[text[:300] for text in texts], *prompts, ["strength of our navy"]])
    one = loading.LoadedSAE("planted", made, common.About(), "gemma3_270m", SITE, SITE)
    saving.write(folder / "runs" / "quickstart", "saelens", one)
    held_out = np.array([[masking.BOS, *encode(text[2000:])][:64] for text in texts], np.int32)

    @functools.cache
    def open_scope(path):
        return dataclasses.replace(session.open_scope(path), held_out=lambda: Rows(held_out))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(placement, "load_gemma", lambda config: loaded)
        patch.setattr(analysis, "open_scope", open_scope)
        # Fewer random sets, rows and new tokens than in the tutorial are enough to see that it runs.
        patch.setattr(analysis, "correct", functools.partial(analysis.correct, random_sets=4, rows=2))
        steer = analysis.steer
        patch.setattr(analysis, "steer", lambda *args, num_tokens: steer(*args, num_tokens=num_tokens // 4))
        yield notebooks.names_of


def test_what_a_latent_means(run, capsys):
    names = run("what_a_latent_means")
    assert names["latent"] == NAVY
    look = names["look"]
    assert look.strongest[0].values[look.strongest[0].peak] == look.largest
    ((clean,),), ((changed,),) = names["steered"].clean, names["steered"].changed
    assert clean != changed and clean[:20] in capsys.readouterr().out
    swept = names["swept"]
    assert swept.effect_N[1] == swept.damage_N[1] == 0 and swept.unit == look.mean


def test_what_mattered(run):
    names = run("what_mattered")
    of = names["of"]
    summed = of.latents_L.sum() + of.error_L.sum() + of.bias_L.sum()
    np.testing.assert_allclose(summed, of.total_L.sum(), rtol=1e-4)
    assert abs(names["integrated"].integral.gap) <= 1e-3 * abs(names["gain"])
    assert names["ablated"].correlation().pearson > 0.5
    assert names["flow"].lens.texts[int(names["flow"].lens.answer_L[0])] == " Representatives"


def test_a_bias_is_corrected(run):
    names = run("correct_a_bias")
    corrected = names["corrected"]
    assert names["found"].found()[0][1] == WOMEN and names["gap"] > 1
    assert corrected.narrowed(corrected.ablated) > max(map(corrected.narrowed, corrected.random))
    assert isinstance(corrected.figure(), matplotlib.figure.Figure)
