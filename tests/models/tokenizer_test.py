"""The tokenizer is read from each kind of file, and a tokenizer of another model is refused."""

import io
import json
import os

import pytest
import sentencepiece
import tokenizers

from gemma_scope_jax.models import chat, masking, registry, tokenizer

TEXT = "Hello world!\n\nThe  quick brown fox — ünïcode 12345"
# The output of Gemma's own tokenizer.
TOKENS = [9259, 1902, 236888, 108, 818, 138, 41007, 8864, 37423, 2192, 174898, 238527, 3970, 236743, 236770, 236778,
          236800, 236812, 236810]  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return tokenizer.load("gemma3_270m", "", "")


def test_the_tokenizer_rebuilt_from_a_gguf_vocabulary_equals_gemmas(real):
    assert real.encode(TEXT) == TOKENS
    assert real.decode(TOKENS) == TEXT
    assert real.size == 262_144
    # A user-defined piece with spaces, and bytes that no piece covers.
    assert real.decode(real.encode("a     b \U000130c0")) == "a     b \U000130c0"


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(real):
    assert real.encode("a\ud800b \udce9") == real.encode("a\ufffdb \ufffd")
    assert real.decode(real.encode("a\0b")) == "a\0b"


def test_the_chat_template_equals_gemmas(real):
    """Gemma's documentation gives it as <start_of_turn>user, a newline, the text, <end_of_turn>, …"""
    before, after = chat.chat_template(real)
    assert real.decode([2, *before, *real.encode("Hi"), *after]).endswith("user\nHi\nmodel\n")
    assert before == [105, 2364, 107] and after == [106, 107, 105, 4368, 107]


def sentencepiece_bytes(size, pad_id=0):
    """A SentencePiece model of `size` pieces with Gemma's special tokens."""
    model = io.BytesIO()
    sentences = [f"{a}{b} the stars of word{a * b} rivers" for a in range(30) for b in range(30)]
    ids = {"pad_id": pad_id, "eos_id": 1, "bos_id": 2 if pad_id == 0 else 0, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=size, model_type="bpe",
        bos_piece="<bos>", eos_piece="<eos>", pad_piece="<pad>", add_dummy_prefix=False, minloglevel=2,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"], **ids,
    )  # fmt: skip
    return model.getvalue()


def hugging_face_json(size):
    """A tokenizer.json of `size` entries: Gemma's special tokens and single characters."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary = {piece: i for i, piece in enumerate([*specials, *(chr(32 + i) for i in range(size - 6))])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.add_special_tokens(specials)
    return made.to_str()


@pytest.fixture
def small_vocabulary(monkeypatch):
    """Registers a model with a vocabulary of 120 tokens as `gemma2_small`."""

    class Model:
        class config:
            num_embed = 120

    monkeypatch.setitem(registry.MODELS, "gemma2_small", registry.ModelSpec(Model, "", ""))


def test_each_kind_of_file_is_found_beside_the_weights_or_by_name(small_vocabulary, tmp_path):
    weights = tmp_path / "checkpoint" / "weights"
    weights.mkdir(parents=True)
    (weights / "tokenizer.json").write_text(hugging_face_json(120))
    beside = tokenizer.load("gemma2_small", "", str(weights))
    assert beside.encode("ab") == [6 + ord("a") - 32, 6 + ord("b") - 32] and beside.size == 120
    # Google's file is preferred, and the parent folder is searched too.
    proto = sentencepiece_bytes(120)
    (weights / "tokenizer.model").write_bytes(proto)
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert tokenizer.load("gemma2_small", "", str(weights)).encode("stars") == reference.encode("stars")
    (weights / "tokenizer.model").rename(tmp_path / "checkpoint" / "tokenizer_gemma2.model")
    (weights / "tokenizer.json").rename(tmp_path / "other.json")
    assert tokenizer.load("gemma2_small", "", str(weights)).encode("stars") == reference.encode("stars")
    named = tokenizer.load("gemma2_small", str(tmp_path / "other.json"), str(weights))
    assert named.encode("ab") == beside.encode("ab")


def test_googles_tokenizer_is_read_from_gemmas_cache(small_vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path))
    (tmp_path / "tokenizer").mkdir()
    proto = sentencepiece_bytes(120)
    (tmp_path / "tokenizer" / "tokenizer_gemma2.model").write_bytes(proto)
    (tmp_path / "weights").mkdir()
    loaded = tokenizer.load("gemma2_small", "", str(tmp_path / "weights"))
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert loaded.encode("stars and words") == reference.encode("stars and words")
    assert loaded.token_id("<start_of_turn>") == 4


def test_the_name_of_a_special_token_in_a_text_is_not_that_token(small_vocabulary, tmp_path):
    (tmp_path / "tokenizer.json").write_text(hugging_face_json(120))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(120))
    for name in ("tokenizer.json", "tokenizer.model"):
        loaded = tokenizer.load("gemma2_small", str(tmp_path / name), "")
        assert not {masking.BOS, masking.EOS, masking.PAD} & set(loaded.encode("a <bos> b <eos> <pad>")), name
        turns = [loaded.token_id(f"<{which}_of_turn>") for which in ("start", "end")]
        assert not set(turns) & set(loaded.encode("a <start_of_turn>user b <end_of_turn>")), name
        assert loaded.token_id("<start_of_turn>") == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.model", None, "no tokenizer at"),
        ("cut.model", sentencepiece_bytes(120)[:500], "cannot read the tokenizer"),
        ("cut.json", hugging_face_json(120)[:500].encode(), "cannot read the tokenizer"),
        ("small.json", hugging_face_json(100).encode(), "has 100 tokens, but gemma2_small has 120"),
        ("large.json", hugging_face_json(190).encode(), "has 190 tokens, but gemma2_small has 120"),
        ("others.model", sentencepiece_bytes(120, pad_id=2), "has <pad> at 2, expected 0: it is not Gemma's"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(small_vocabulary, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load("gemma2_small", str(tmp_path / name), "")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer.gguf"])
def test_pipes_devices_and_huge_files_are_refused(small_vocabulary, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**40)  # A sparse file.
    for odd in ("pipe", "hole", "/dev/zero"):
        (tmp_path / name).symlink_to(tmp_path / odd)
        with pytest.raises(ValueError, match=f"cannot read the tokenizer .*{name}"):
            tokenizer.load("gemma2_small", str(tmp_path / name), "")
        (tmp_path / name).unlink()


def test_ids_beyond_the_vocabulary_are_refused(small_vocabulary, tmp_path):
    """Gemma 3's token for images is an example: a text model's embedding has no row for it."""
    (tmp_path / "tokenizer.json").write_text(hugging_face_json(123))
    loaded = tokenizer.load("gemma2_small", str(tmp_path / "tokenizer.json"), "")
    last = json.loads(hugging_face_json(123))["model"]["vocab"]
    beyond = next(piece for piece, number in last.items() if number == 121)
    with pytest.raises(ValueError, match=r"outputs token 121, .* of 120"):
        loaded.encode(f"a{beyond}")
