"""The chat template: the tokens around a turn, and the turn that each token belongs to."""

from collections.abc import Callable

import numpy as np

from gemma_scope_jax.models.masking import BOS, CHAT_PREFIX_LENGTH, PAD
from gemma_scope_jax.models.tokenizer import Tokenizer
from gemma_scope_jax.runtime.errors import WeightsError


def chat_template(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of Gemma's chat template between BOS and a user's turn, and from there to the model's reply."""
    start, end = (tokenizer.token_id(piece) for piece in ("<start_of_turn>", "<end_of_turn>"))
    if start is None or end is None:
        raise WeightsError(
            "the tokenizer has no <start_of_turn> and <end_of_turn>; set data.chat_template to False"
        )
    before = [start, *tokenizer.encode("user\n")]
    after = [end, *tokenizer.encode("\n"), start, *tokenizer.encode("model\n")]
    if len(before) != CHAT_PREFIX_LENGTH:
        raise WeightsError(
            f"the tokenizer encodes the user prefix as {len(before)} tokens, expected {CHAT_PREFIX_LENGTH}: it is "
            "not Gemma's"
        )
    return before, after


def in_turns(tokenizer: Tokenizer, whose: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function that marks the positions in the turns of the "user" or the "model", in rows of tokens [S, L].

    The chat template's own tokens are in neither turn.
    """
    before, after = chat_template(tokenizer)
    opening, end = {"user": before, "model": after[2:]}[whose], after[0]

    def is_inside(tokens_SxL: np.ndarray) -> np.ndarray:
        place_L = np.arange(tokens_SxL.shape[1])
        opened_SxL = np.zeros(tokens_SxL.shape, int)
        for offset, token in enumerate(opening, 1):  # Finds the position after each complete opening.
            matched_SxL = np.roll(tokens_SxL, len(opening) + 1 - offset, axis=1) == token
            opened_SxL += matched_SxL & (place_L >= len(opening))
        is_opened_SxL = opened_SxL == len(opening)
        is_closed_SxL = np.isin(tokens_SxL, (end, before[0], BOS, PAD))
        last_SxL = [
            np.maximum.accumulate(np.where(is_it, place_L, -1), axis=1)
            for is_it in (is_opened_SxL, is_closed_SxL)
        ]
        return last_SxL[0] > last_SxL[1]

    return is_inside
