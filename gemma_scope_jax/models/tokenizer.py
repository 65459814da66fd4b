"""Gemma's tokenizer, read from a SentencePiece file, Hugging Face's tokenizer.json or a GGUF file."""

import dataclasses
import re
from collections.abc import Callable

import sentencepiece
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from gemma_scope_jax.models import gguf_file, masking, registry, weights
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import WeightsError
from gemma_scope_jax.runtime.printing import printable, well_formed
from gemma_scope_jax.runtime.reporting import say

# Names of the tokenizer beside a checkpoint, by preference: Hugging Face's and Google's SentencePiece files first.
_FILES = ("tokenizer.model", "tokenizer_{}.model", "tokenizer.json")

# Splits a document inside pieces that only the chat template may insert, so that they are encoded as plain text.
_TURN = re.compile(r"(?<=<)(?=(?:start|end)_of_turn>)")

# Ids that a tokenizer may have after the model's vocabulary: Gemma 3's has one for images.
_SPARE_IDS = 64

_NAMES = {masking.PAD: "<pad>", masking.EOS: "<eos>", masking.BOS: "<bos>"}

_MAX_BYTES = 2**28  # Gemma 3's tokenizer.json takes 33 MB.


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    encode: Callable[[str], list[int]]  # Without BOS; a control token in the text is plain text.
    decode: Callable[[list[int]], str]
    token_id: Callable[[str], int | None]
    size: int


def load(name: str, path: str, weights_path: str) -> Tokenizer:
    """The tokenizer of a model.

    Args:
      name: the name of the model.
      path: a SentencePiece file, a tokenizer.json or a GGUF file, or a folder with one of them. If empty, the file
        beside the weights, otherwise the model's default; the gemma package fetches Google's.
      weights_path: the path of the model's weights, as in `placement.load`.

    Raises:
      ValueError: if there is no tokenizer, or it is damaged or another model's.
    """
    own, found = registry.spec(name).tokenizer, None
    say("Loading Gemma's tokenizer …")
    if path or weights_path or own is None:
        place = weights.local(path or registry.weights_path(name, weights_path))
        found = _find(place, name.split("_")[0])
    if found is None and path:
        raise WeightsError(
            f"no tokenizer at {path}; give a SentencePiece file, a tokenizer.json or a GGUF file"
        )
    if found is None and own is not None:
        found, loaded = f"of {name}", own()
    elif found is None:
        found = f"of Google for {name}"
        loaded = _googles(name)
    else:
        loaded = _read(found)
    vocabulary = registry.build_model(name).config.num_embed
    if not vocabulary <= loaded.size <= vocabulary + _SPARE_IDS:
        raise WeightsError(
            f"the tokenizer {found} has {loaded.size} tokens, but {name} has {vocabulary}; set config.tokenizer to "
            "the model's own"
        )
    for piece, number in (("<pad>", masking.PAD), ("<eos>", masking.EOS), ("<bos>", masking.BOS)):
        if loaded.token_id(piece) != number:
            raise WeightsError(
                f"the tokenizer {found} has {piece} at {loaded.token_id(piece)}, expected {number}: it is not Gemma's"
            )

    def encode(text: str) -> list[int]:
        ids = [token for part in _TURN.split(well_formed(text)) for token in loaded.encode(part)]
        if ids and max(ids) >= vocabulary:
            raise WeightsError(
                f"the tokenizer {found} outputs token {max(ids)}, but {name} has a vocabulary of {vocabulary}"
            )
        return ids

    return dataclasses.replace(loaded, encode=encode)


def token_texts(decode: Callable[[list[int]], str]) -> Callable[[int], str]:
    """A function from a token to its text. Control tokens, which decode to nothing, have their names."""
    return lambda token: _NAMES.get(token) or decode([token])


def _find(path: str, family: str) -> str | None:
    """The tokenizer file at a path, in this folder or in its parent; `family` is such as gemma2."""
    given = epath.Path(path)
    if path.endswith((".model", ".json", ".gguf")):
        candidates = [given]
    else:
        candidates = [folder / name.format(family) for folder in (given, given.parent) for name in _FILES]
    try:
        return next((str(file) for file in candidates if file.exists()), None)
    except Exception as error:  # A bucket that cannot be reached.
        raise WeightsError(f"cannot reach {path}: {' '.join(str(error).split())[:200]}") from error


def _googles(name: str) -> Tokenizer:
    """Google's tokenizer, from the gemma package's cache or fetched from its bucket."""
    try:
        made = gm.text.Gemma2Tokenizer() if name.startswith("gemma2") else gm.text.Gemma3Tokenizer()
        ids = {piece: number for number, piece in enumerate(made.tokens)}
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"cannot fetch Google's tokenizer for {name} ({reason}); set config.tokenizer to a file"
        ) from error
    return Tokenizer(made.encode, made.decode, ids.get, made.vocab_size)


def _read(path: str) -> Tokenizer:
    try:
        if weights.is_gguf(path):
            return _from_sentencepiece(_proto_from_gguf(path))
        if path.endswith(".json"):
            return _from_hugging_face(_content(path).decode())
        return _from_sentencepiece(_content(path))
    except Exception as error:  # Each library has its own errors; SentencePiece's is a bare RuntimeError.
        raise WeightsError(
            f"cannot read the tokenizer {path}: {printable(' '.join(str(error).split()))}"
        ) from error


def _content(path: str) -> bytes:
    return epath.Path(path).read_bytes() if "://" in path else files.read_regular(path, _MAX_BYTES)


def _from_sentencepiece(proto: bytes) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)

    def token_id(piece: str) -> int | None:
        found = processor.piece_to_id(piece)
        return None if found == processor.unk_id() else found

    return Tokenizer(processor.encode, processor.decode, token_id, processor.vocab_size())


def _from_hugging_face(text: str) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(text)
    # The text "<bos>" in a document must not begin a segment.
    tokenizer.encode_special_tokens = True
    return Tokenizer(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.decode,
        tokenizer.token_to_id,
        tokenizer.get_vocab_size(),
    )


def _proto_from_gguf(path: str) -> bytes:
    """The SentencePiece model with the vocabulary of a GGUF file.

    It has byte-pair merges with byte fallback, adds no dummy prefix, and keeps spaces as they are.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    pieces, scores, kinds = (
        gguf_file.field(path, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        # User-defined pieces hold literal spaces, which the processor only ever sees escaped.
        text = piece.replace(" ", "▁") if kind == user_defined else piece
        proto.pieces.add(piece=text, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    spec.byte_fallback = True
    spec.vocab_size = len(pieces)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = int(gguf_file.field(path, f"tokenizer.ggml.{key}_token_id"))
        setattr(spec, f"{name}_id", token)
        setattr(spec, f"{name}_piece", pieces[token])
    # llama.cpp marks <unk> as a control piece; SentencePiece requires the kind UNKNOWN.
    proto.pieces[spec.unk_id].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNKNOWN
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
