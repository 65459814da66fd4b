"""Text generation with Gemma, greedy or sampled, with writes to any site.

There are two compiled programs: one runs the prompts, the other is the loop over new tokens. Both fill a cache of
keys and values. All rows share its slots: prompts are padded on the left, so that they all end in the same slot.

Shapes: S prompts, L tokens run at once, C slots of the cache, N new tokens, D site width, V vocabulary.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.models import chat, forward, interventions, masking, predictions
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site, check_site
from gemma_scope_jax.models.tokenizer import Tokenizer
from gemma_scope_jax.runtime import distributed, ranges, reporting, sharding
from gemma_scope_jax.runtime.errors import InputError


class Cache(NamedTuple):
    """The tokens run so far: keys and values in slots that all rows share, and the slot in which each row begins."""

    blocks: forward.Cache
    start_S: jax.Array


def new_cache(gemma: Gemma, start_S: jax.Array, slots: int) -> Cache:
    """An empty cache. Every block has all slots, even blocks with sliding-window attention."""
    blocks = gemma.module.config.init_cache(start_S.size, gemma.dtype, cache_length=slots)
    return Cache(jax.tree.map(functools.partial(_by_rows, gemma.mesh), blocks), start_S)


def _by_rows(mesh: jax.sharding.Mesh, value: jax.Array) -> jax.Array:
    """Splits rows over all chips. The number of used slots is the same for all rows, and is replicated."""
    return sharding.constrain(mesh, value, sharding.TOKENS if value.ndim > 1 else sharding.REPLICATED)


def advance(
    gemma: Gemma,
    cache: Cache,
    tokens_SxL: jax.Array,
    is_prompt: bool,
    write: Mapping[Site, interventions.Intervention],
) -> tuple[Cache, jax.Array]:
    """Runs tokens after those in the cache.

    Returns:
      The cache with these tokens added, and the logits [S, V] of the token after the last of them.
    """
    first = cache.blocks["layer_0"]
    slot_L = first["end_index"][0] + jnp.arange(tokens_SxL.shape[1])
    slot_1x1xC = jnp.arange(first["k"].shape[1])[None, None]
    # From slots, not from tokens: a BOS or PAD that the model generates is an ordinary token.
    positions_SxL = slot_L[None] - cache.start_S[:, None]
    mask_SxLxC = (slot_1x1xC <= slot_L[None, :, None]) & (slot_1x1xC >= cache.start_S[:, None, None])
    replace = interventions.at(write, tokens_SxL, positions_SxL, jnp.full(tokens_SxL.shape, is_prompt))

    # Prompts run as in a harvest: each chip has its own rows, and blocks are gathered. New tokens do not: one token
    # per row is less to communicate than the weights, which the compiler would gather before its loop and keep.
    if is_prompt:
        gemma = gemma.gathered()
    spec = sharding.TOKENS if is_prompt else sharding.REPLICATED
    x_SxLxD = sharding.constrain(gemma.mesh, forward.embed(gemma, tokens_SxL), spec)
    x_SxLxD, _, blocks = forward.walk(
        gemma, x_SxLxD, positions_SxL, mask_SxLxC, gemma.layers, write=replace, cache=cache.blocks
    )
    logits_SxV = predictions.logits(gemma, x_SxLxD[:, -1])
    return Cache(blocks, cache.start_S), sharding.constrain(gemma.mesh, logits_SxV, sharding.REPLICATED)


@functools.partial(jax.jit, static_argnames="num_tokens")
def _run_prompts(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    start_S: jax.Array,
    write: Mapping[Site, interventions.Intervention],
    num_tokens: int,
) -> tuple[Cache, jax.Array]:
    """The cache with the prompts and room for `num_tokens`, and the logits [S, V] of each reply's first token."""
    cache = new_cache(gemma, start_S, tokens_SxL.shape[1] + num_tokens)
    return advance(gemma, cache, tokens_SxL, True, write)


def _draw(
    logits_SxV: jax.Array, keys_S: jax.Array, number: jax.Array | int, temperature: jax.Array
) -> jax.Array:
    """A sampled token [S] for each row, from its key and the token's number; at temperature 0 the likeliest."""

    def sample() -> jax.Array:
        now_S = jax.vmap(jax.random.fold_in, (0, None))(keys_S, number)
        return jax.vmap(jax.random.categorical)(now_S, logits_SxV / temperature)

    return jax.lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits_SxV, axis=-1))


class _State(NamedTuple):
    number: jax.Array  # Tokens written so far.
    cache: Cache
    replies_SxN: jax.Array
    is_over_S: jax.Array


@functools.partial(jax.jit, donate_argnames=("cache", "replies_SxN"))
def _write_replies(
    gemma: Gemma,
    cache: Cache,
    replies_SxN: jax.Array,
    logits_SxV: jax.Array,
    is_over_S: jax.Array,
    write: Mapping[Site, interventions.Intervention],
    keys_S: jax.Array,
    temperature: jax.Array,
    stop_K: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Fills the replies. The cache is returned because it is donated."""

    def record(state: _State, logits_SxV: jax.Array) -> _State:
        token_S = _draw(logits_SxV, keys_S, state.number, temperature)
        token_S = jnp.where(state.is_over_S, masking.PAD, token_S)
        replies_SxN = jax.lax.dynamic_update_slice(state.replies_SxN, token_S[:, None], (0, state.number))
        is_over_S = state.is_over_S | (token_S[:, None] == stop_K[None]).any(axis=1)
        return _State(state.number + 1, state.cache, replies_SxN, is_over_S)

    def is_wanted(state: _State) -> jax.Array:
        return (state.number < replies_SxN.shape[1]) & ~state.is_over_S.all()

    def extend(state: _State) -> _State:
        token_Sx1 = jax.lax.dynamic_slice_in_dim(state.replies_SxN, state.number - 1, 1, axis=1)
        cache, logits_SxV = advance(gemma, state.cache, token_Sx1, False, write)
        return record(state._replace(cache=cache), logits_SxV)

    state = record(_State(jnp.zeros((), jnp.int32), cache, replies_SxN, is_over_S), logits_SxV)
    state = jax.lax.while_loop(is_wanted, extend, state)
    return state.cache, sharding.constrain(gemma.mesh, state.replies_SxN, sharding.REPLICATED)


def generate(
    gemma: Gemma,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    write: Mapping[Site, interventions.Intervention] | None = None,
    stop: Sequence[int] = (masking.EOS,),
    rows_per_batch: int = 16,
) -> list[list[int]]:
    """Generates a reply to each prompt.

    A reply depends on its prompt, the prompt's number and the seed, but not on the other prompts in its batch, except
    that rounding in matmuls may change a sampled token. All batches have the same shape: prompts are padded to the
    next power of two.

    Args:
      gemma: the whole model; its weights can be split over its mesh.
      prompts: token ids, each beginning with its only BOS.
      num_tokens: the maximum number of tokens in a reply.
      temperature: the divisor of the logits; 0 always takes the likeliest token.
      seed: the seed for sampling.
      write: functions, by site, that map its activations and their `Where` to a replacement, in prompts and replies.
        A function is compiled again unless it is the same object. For arrays that change between calls, use a
        `jax.tree_util.Partial(function, array)`, which passes them as the first arguments.
      stop: tokens that end a reply.
      rows_per_batch: the number of prompts that are run together, over all devices.

    Returns:
      The token ids of the replies, without the prompts. A stop token that ends a reply is included.

    Raises:
      ValueError: if a prompt is invalid, the model is not whole or has no such site, or a number is out of range.
    """
    write = {
        site: function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)
        for site, function in (write or {}).items()
    }
    _check(gemma, prompts, num_tokens, temperature, seed, write, rows_per_batch)
    if not prompts:
        return []
    rows = -(-min(rows_per_batch, len(prompts)) // gemma.mesh.size) * gemma.mesh.size
    length = 1 << (max(map(len, prompts)) - 1).bit_length()
    replies = []
    starts = range(0, len(prompts), rows)
    bar = reporting.bar("Generating", "batch", len(starts), compiles=1)
    for start in starts:
        batch = prompts[start : start + rows]
        tokens_SxL, start_S = _padded(batch, rows, length)
        placed = jax.device_put(tokens_SxL, jax.NamedSharding(gemma.mesh, sharding.TOKENS))
        cache, logits_SxV = _run_prompts(gemma, placed, start_S, write, num_tokens)
        _, replies_SxN = _write_replies(
            gemma,
            cache,
            jnp.full((rows, num_tokens), masking.PAD, jnp.int32),
            logits_SxV,
            jnp.arange(rows) >= len(batch),
            write,
            jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(start, start + rows)),
            jnp.float32(temperature),
            jnp.asarray(list(stop), jnp.int32),
        )
        replies += [_until(stop, reply) for reply in distributed.fetch(replies_SxN)[: len(batch)].tolist()]
        bar.update()
    bar.close()
    return replies


def _padded(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` prompts [S, L] that end together, and the start of each [S]; extra rows are a single BOS."""
    filled = [*prompts, *[[masking.BOS]] * (rows - len(prompts))]
    starts = [length - len(prompt) for prompt in filled]
    padded = [[masking.PAD] * start + list(prompt) for start, prompt in zip(starts, filled, strict=True)]
    return np.array(padded, np.int32), np.array(starts, np.int32)


def _until(stop: Sequence[int], reply: list[int]) -> list[int]:
    ends = (number for number, token in enumerate(reply, 1) if token in stop)
    return reply[: next(ends, len(reply))]


def _check(
    gemma: Gemma,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    temperature: float,
    seed: int,
    write: Mapping[Site, interventions.Intervention],
    rows_per_batch: int,
) -> None:
    config = gemma.module.config
    if gemma.num_layers < config.num_layers:
        raise InputError(
            f"only {gemma.num_layers} of {gemma.name}'s {config.num_layers} blocks are loaded; load all of them"
        )
    ranges.check("num_tokens", num_tokens, ranges.NEW_TOKENS)
    ranges.check("rows_per_batch", rows_per_batch, ranges.COUNT)
    ranges.check("temperature", temperature, ranges.POSITIVE_OR_ZERO)
    ranges.check("seed", seed, ranges.SEED)
    for site in write:
        check_site(gemma.module, site)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0 or prompt[0] != masking.BOS or masking.BOS in prompt[1:] or masking.PAD in prompt:
            raise InputError(
                f"prompt {number} is {list(prompt[:8])}…; a prompt must begin with its only BOS ({masking.BOS}) and "
                f"have no PAD ({masking.PAD})"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.num_embed:
            raise InputError(
                f"prompt {number} has tokens {min(prompt)} to {max(prompt)}, but {gemma.name} has a vocabulary of "
                f"{config.num_embed}"
            )


def text_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt tokens of a text that the model will continue."""
    return [masking.BOS, *tokenizer.encode(text)]


def chat_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt tokens of a user's turn that an instruction-tuned model will answer."""
    before, after = chat.chat_template(tokenizer)
    return [masking.BOS, *before, *tokenizer.encode(text), *after]


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a document or a turn: EOS and, if the tokenizer has it, <end_of_turn>."""
    end_of_turn = tokenizer.token_id("<end_of_turn>")
    return (masking.EOS,) if end_of_turn is None else (masking.EOS, end_of_turn)


def reply_text(tokenizer: Tokenizer, reply: Sequence[int]) -> str:
    """A reply as text, without the stop token that ends it."""
    ends = len(reply) > 0 and reply[-1] in stop_tokens(tokenizer)
    return tokenizer.decode(list(reply[:-1] if ends else reply))
