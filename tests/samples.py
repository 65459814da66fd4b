"""A few sample documents, and functions that recover documents from packed rows."""

from gemma_scope_jax.models.masking import BOS, PAD


def unpack(rows):
    """The tokens of each document in packed rows, by the document's number."""
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
