"""Packs documents into rows of tokens, and chooses the documents that are held out.

A row of L tokens holds one or more segments. Each document, and each continuation of a long one, begins with its own
BOS, so the tokens alone show where segments begin.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data.sources import Exchange
from gemma_scope_jax.models.masking import BOS, PAD
from gemma_scope_jax.models.tokenizer import Tokenizer
from gemma_scope_jax.runtime.errors import DataError


def is_held_out(config: config_lib.DataConfig, document: int) -> bool:
    """Whether a document is held out of training; depends only on the seed and the document's number."""
    return bool(np.random.default_rng((config.seed, document)).random() < config.held_out_fraction)


def pack(
    documents: Iterator[list[int]],
    length: int,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    is_cut: bool = False,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields rows of `length` tokens, each with the number of its first document.

    A segment is BOS, `before`, a document or a part of one, `after`. A document is continued only at the start of a
    row, so segment k of a row belongs to document `first_document + k`. With `is_cut`, documents are not continued:
    each begins in a row that has room for it, or is cut off at the end of its row.

    Raises:
      ValueError: if `length` leaves no room for a document.
    """
    frame = 1 + len(before) + len(after)
    if length <= frame:
        raise DataError(
            f"data.context_length is {length}, but BOS and the chat template alone take {frame} tokens; set it higher"
        )
    # A shorter piece is not started at the end of a row; the row is padded instead.
    shortest = max(length // 16, frame + 1)
    row: list[int] = []
    first_document = 0
    for number, tokens in enumerate(tokens for tokens in documents if tokens):
        begin = 0
        while begin < len(tokens):
            room = length - len(row)
            if room < min(length if is_cut else shortest, len(tokens) - begin + frame):
                yield _padded(row, length), first_document
                row, room = [], length
            if not row:
                first_document = number
            # Sliced by index, so that the rest of a long document is not copied for each row.
            end = begin + room - frame
            row += [BOS, *before, *tokens[begin:end], *after]
            begin = len(tokens) if is_cut else end
    if row:
        yield _padded(row, length), first_document


def encode(tokenizer: Tokenizer, document: str | Exchange, between: Sequence[int]) -> list[int]:
    """The tokens of a document; in an exchange, `between` holds the chat template's tokens between the turns.

    Raises:
      ValueError: if the document is an exchange and `between` is empty.
    """
    if isinstance(document, str):
        return tokenizer.encode(document)
    if not between:
        raise DataError(
            "the text has prompts and replies; set data.chat_template, give evaluate --turns, or remove "
            'each "prompt"'
        )
    return [*tokenizer.encode(document.prompt), *between, *tokenizer.encode(document.reply)]


def _padded(row: list[int], length: int) -> np.ndarray:
    return np.array(row + [PAD] * (length - len(row)), np.int32)
