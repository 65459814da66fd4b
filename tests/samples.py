"""A few documents, and what packed rows hold of them."""

from gemma_scope_jax.models.masking import BOS, PAD


def unpack(rows):
    """The tokens of each document of packed rows, by the numbers that the rows give them."""
    documents = {}
    for tokens, first_document in rows:
        segment = -1
        for token in tokens:
            segment += token == BOS
            if token not in (BOS, PAD):
                documents.setdefault(first_document + segment, []).append(int(token))
    return documents


def texts(count=20):
    return [f"document {i} says {i * i}" for i in range(count)]


def decode(tokens):
    return bytes(t - 3 for t in tokens).decode()
