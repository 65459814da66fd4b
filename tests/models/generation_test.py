"""Generation with a cache equals transformers and a pass over the whole text without a cache."""

import functools

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
import toys

from gemma_scope_jax.models import (
    forward,
    generation,
    interventions,
    masking,
    placement,
    predictions,
    weights,
)
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import SITES, Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import jumprelu

KINDS = [kind for kind in SITES if kind != "embed"]
ALL_SITES = [Site("embed", 0), *(Site(kind, layer) for kind in KINDS for layer in (0, 3))]
LENGTHS = (3, 11, 6)  # The attention window is 6.


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [[masking.BOS, *rng.integers(3, 259, size=n - 1).tolist()] for n in LENGTHS]


def add_to_replies(vector, x_SxLxD, where):
    """An intervention that steers only the reply."""
    return jnp.where(where.is_prompt_SxL[..., None], x_SxLxD, x_SxLxD + vector[None, None])


def splice(subject, x_SxLxD, where):
    """An intervention that splices in an SAE's reconstruction, except at BOS and padding."""
    x_BxD = x_SxLxD.reshape(-1, x_SxLxD.shape[-1])
    recon_SxLxD = jumprelu.decode(subject, jumprelu.encode(subject, x_BxD)).reshape(x_SxLxD.shape)
    return jnp.where(where.positions_SxL[..., None] > 0, recon_SxLxD, x_SxLxD)


def zero_a_token(x_SxLxD, where):
    return jnp.where((where.tokens_SxL == 100)[..., None], 0, x_SxLxD)


VECTOR = np.random.default_rng(5).normal(size=32).astype(np.float32)
INTERVENTIONS = {
    "none": {},
    "splice": {Site("mlp_out", 2): jax.tree_util.Partial(splice, toys.random_sae())},
    "two": {
        Site("embed", 0): zero_a_token,
        Site("resid_post", 2): jax.tree_util.Partial(add_to_replies, VECTOR),
    },
}


@jax.jit
def whole_pass(gemma, tokens, prompt_length, write):
    index = jnp.arange(tokens.shape[1])[None]
    bound = interventions.at(write, tokens, index, index < prompt_length)
    x = forward.embed(gemma, tokens)
    x, _ = forward.run_blocks(gemma, x, tokens, gemma.layers, write=bound)
    return predictions.logits(gemma, x)


def partials(write):
    return {site: jax.tree_util.Partial(function) for site, function in write.items()}


def recomputed(loaded, prompt, reply, write):
    """The logits [N, V] at each token of a reply, from one pass over prompt and reply without a cache."""
    tokens = [*prompt, *reply]
    padded = jnp.asarray([tokens + [masking.PAD] * (36 - len(tokens))])
    logits = whole_pass(loaded, padded, len(prompt), partials(write))
    return np.asarray(logits[0, len(prompt) - 1 : len(tokens) - 1])


advance = jax.jit(generation.advance, static_argnames="is_prompt")


def stepwise(gemma, rows, prompt_lengths, write):
    """Logits [S, N, V] from prompts padded on the left, followed by the rows' other tokens one at a time."""
    run = functools.partial(advance, gemma)
    width, steps = max(prompt_lengths), len(rows[0]) - prompt_lengths[0]
    padded = [
        [masking.PAD] * (width - n) + list(row[:n]) for row, n in zip(rows, prompt_lengths, strict=True)
    ]
    start_S = jnp.asarray([width - n for n in prompt_lengths])
    cache = generation.new_cache(gemma, start_S, width + steps)
    write = partials(write)
    cache, logits = run(cache, jnp.asarray(padded), is_prompt=True, write=write)
    found = [logits]
    for step in range(steps):
        tokens = jnp.asarray([[row[n + step]] for row, n in zip(rows, prompt_lengths, strict=True)])
        cache, logits = run(cache, tokens, is_prompt=False, write=write)
        found.append(logits)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("name", small.NAMES)
def test_logits_with_a_cache_equal_transformers(name):
    """The models have windows, soft-caps, grouped queries, key norms and frequencies by layer."""
    want = dict(np.load(small.FOLDER / name / "expected.npz"))
    model = small.model(name)
    depth = model.config.num_layers
    params = weights.load_params(str(small.FOLDER / name), model, depth, jnp.float32, small.on_device)
    gemma = Gemma(name, model, sharding.one_device(), depth, params)
    rows = [want[f"tokens_{i}"].tolist() for i in range(3)]
    found = stepwise(gemma, rows, [len(row) - 5 for row in rows], {})
    for i in range(3):
        reference = want[f"alone_{i}/logits"].astype(np.float64)
        error = np.abs(found[i] - reference[-6:]).max()
        assert error <= 1e-4 * np.sqrt(np.square(reference).mean()), i


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_logits_with_a_cache_equal_those_without_a_cache(tiny_gemma, name):
    rng = np.random.default_rng(1)
    write = INTERVENTIONS[name]
    replies = [rng.integers(3, 259, size=9).tolist() for _ in LENGTHS]
    replies[0][4] = 100
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts(), replies, strict=True)]
    found = stepwise(tiny_gemma, rows, LENGTHS, write)
    for i, prompt in enumerate(prompts()):
        alone = recomputed(tiny_gemma, prompt, replies[i], write)
        np.testing.assert_allclose(found[i, :-1], alone, atol=1e-4)
        if write:
            assert np.abs(alone - recomputed(tiny_gemma, prompt, replies[i], {})).max() > 1e-2


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_greedy_replies_are_the_likeliest_tokens_without_a_cache(tiny_gemma, name):
    write = INTERVENTIONS[name]
    replies = generation.generate(tiny_gemma, prompts(), 20, temperature=0, write=write, stop=())
    for prompt, reply in zip(prompts(), replies, strict=True):
        assert len(reply) == 20 and not {masking.BOS, masking.PAD} & set(reply)
        assert recomputed(tiny_gemma, prompt, reply, write).argmax(-1).tolist() == reply


def test_adding_zero_changes_no_bit(tiny_gemma):
    rows = [[*prompt, *range(20, 29)] for prompt in prompts()]
    run = functools.partial(stepwise, tiny_gemma, rows, LENGTHS)
    np.testing.assert_array_equal(run({site: lambda x, where: x + 0 for site in ALL_SITES}), run({}))


def softmax(logits, temperature):
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    return p / p.sum()


def p_value(counts, p):
    """The p-value of Pearson's chi-square test; tokens expected fewer than five times form one class."""
    expected = p * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    statistic = (np.square(observed - expected) / expected).sum()
    return float(jax.scipy.stats.chi2.sf(statistic, len(expected) - 1))


def test_sampled_tokens_follow_the_softmax(tiny_gemma):
    """Checks the first token of a reply, and the second token after the most frequent first one."""
    prompt, rows = prompts()[0], 8192
    drawn = functools.partial(
        generation.generate, tiny_gemma, [prompt] * rows, 2, stop=(), rows_per_batch=rows
    )
    p = softmax(recomputed(tiny_gemma, prompt, [0], {})[0], 0.5)
    counts = np.bincount([pair[0] for pair in drawn(temperature=0.5, seed=3)], minlength=272)
    assert p_value(counts, p) > 0.01
    assert p_value(counts, softmax(np.log(p), 1.2)) < 1e-6  # The test can detect another temperature.

    pairs = drawn(temperature=0.2, seed=4)
    first = np.bincount([pair[0] for pair in pairs]).argmax()
    seconds = [pair[1] for pair in pairs if pair[0] == first]
    assert len(seconds) > 1000
    p = softmax(recomputed(tiny_gemma, prompt, [first, 0], {})[1], 0.2)
    assert p_value(np.bincount(seconds, minlength=272), p) > 0.01


def test_replies_depend_only_on_the_seed_and_the_prompts_index(tiny_gemma):
    given = [prompt for seed in range(3) for prompt in prompts(seed)][:7]
    run = functools.partial(generation.generate, tiny_gemma, num_tokens=8)
    replies = run(given, seed=1)
    assert run(given, seed=1, rows_per_batch=2) == replies
    assert run(given[:2], seed=1) == replies[:2]
    assert run(given, seed=2) != replies
    first, second = run([given[1], given[1]], seed=1)
    assert second == replies[1] and first != second


def test_a_reply_ends_after_its_first_stop_token(tiny_gemma):
    run = functools.partial(generation.generate, tiny_gemma, num_tokens=30, seed=2)
    whole = run(prompts(), stop=())
    stop = (whole[0][3], whole[1][12])
    cut = run(prompts(), stop=stop)
    for reply, short in zip(whole, cut, strict=True):
        ends = [i for i, token in enumerate(reply) if token in stop]
        assert short == (reply[: ends[0] + 1] if ends else reply)
    assert len(cut[0]) <= 4 and len(cut[1]) <= 13 and all(map(len, whole))


def test_generation_stops_when_all_replies_have_ended(tiny_gemma):
    passes = []

    def count(x_SxLxD, where):
        jax.debug.callback(lambda: passes.append(1))
        return x_SxLxD

    run = functools.partial(
        generation.generate, tiny_gemma, prompts()[:2], 9, write={Site("embed", 0): count}
    )
    for stop, expected in ((range(272), 1), ((), 9)):
        passes.clear()
        run(stop=stop)
        jax.effects_barrier()
        assert len(passes) == expected


def test_other_arrays_prompts_and_temperatures_need_no_compilation(tiny_gemma):
    site = Site("resid_post", 1)

    def run(scale, given, **options):
        write = {site: jax.tree_util.Partial(add_to_replies, scale * VECTOR)}
        return generation.generate(
            tiny_gemma, given, 4, write=write, stop=(5, 6), rows_per_batch=2, **options
        )

    def compiled():
        return compilations.so_far("_run_prompts", "_write_replies")

    calm = run(0.0, prompts(), temperature=0)
    before = compiled()
    assert before > 0
    assert run(30.0, prompts(), temperature=0) != calm
    run(1.0, prompts(1)[1:], temperature=0.7, seed=4)
    assert compiled() == before


@pytest.mark.parametrize("split", [True, False])
def test_many_devices_generate_the_same_as_one(tiny_gemma, split):
    mesh = sharding.make_mesh(2, 4)
    place = placement.gemma_placement(mesh, split)
    params = jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(leaf, place(path[-1].key, leaf.shape)), tiny_gemma.params
    )
    placed = tiny_gemma.replace(mesh=mesh, params=params)
    run = functools.partial(generation.generate, num_tokens=10, write=INTERVENTIONS["splice"], seed=1)
    assert run(placed, prompts()) == run(tiny_gemma, prompts())


def test_a_chat_prompt_is_a_users_turn_and_a_replys_text_omits_its_end():
    tokenizer = tiny.load_tokenizer()
    start, end, user, model = 260, 261, 262, 263
    newline, hi = 3 + ord("\n"), [3 + ord("h"), 3 + ord("i")]
    expected = [masking.BOS, start, user, newline, *hi, end, newline, start, model, newline]
    assert generation.chat_prompt(tokenizer, "hi") == expected
    assert generation.text_prompt(tokenizer, "hi") == [masking.BOS, *hi]
    assert generation.stop_tokens(tokenizer) == (masking.EOS, end)
    for tokens in (hi, [*hi, end], [*hi, masking.EOS]):
        assert generation.reply_text(tokenizer, tokens) == "hi"
    assert generation.reply_text(tokenizer, []) == ""


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([5, 6], {}, r"prompt 0 is \[5, 6\]…; a prompt must begin with its only BOS"),
        ([2, 5, 2], {}, "only BOS"),
        ([2, 0, 5], {}, r"no PAD \(0\)"),
        ([], {}, "only BOS"),
        ([2, 272], {}, "prompt 0 has tokens 2 to 272, but tiny has a vocabulary of 272"),
        ([2], {"num_tokens": 0}, "num_tokens is 0; it must be at least 1"),
        ([2], {"rows_per_batch": 0}, "rows_per_batch is 0"),
        ([2], {"temperature": -1.0}, "temperature is -1.0"),
        ([2], {"temperature": float("nan")}, "temperature is nan"),
        ([2], {"write": {Site("mlp_out", 4): splice}}, "layer 4 is out of range"),
    ],
)
def test_invalid_arguments_are_refused(tiny_gemma, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generation.generate(tiny_gemma, [prompt], **{"num_tokens": 3, **options})


def test_a_partly_loaded_model_is_refused(tiny_gemma):
    part = tiny_gemma.replace(num_layers=2)
    with pytest.raises(ValueError, match="only 2 of tiny's 4 blocks are loaded"):
        generation.generate(part, [[2]], 3)
    assert generation.generate(tiny_gemma, [], 3) == []
