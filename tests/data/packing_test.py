"""Text is packed into rows without loss, in an order that depends only on a seed."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from samples import texts, unpack

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import packing, sources, token_rows
from gemma_scope_jax.models import chat, masking
from gemma_scope_jax.models.masking import BOS, PAD


@pytest.mark.parametrize("length", [8, 32, 100])
def test_packing_loses_nothing_and_numbers_documents(length):
    rng = np.random.default_rng(0)
    documents = [
        list(map(int, rng.integers(3, 99, size=n))) for n in [5, 300, 1, 0, 31, 32, 33, 64, 2, 2, 2, 50]
    ]
    rows = list(packing.pack(iter(documents), length))
    assert all(tokens.shape == (length,) and tokens[0] == BOS for tokens, _ in rows)
    kept = [tokens for tokens in documents if tokens]
    assert unpack(rows) == dict(enumerate(kept))
    padding = np.mean([tokens == PAD for tokens, _ in rows])
    assert padding < 0.2


def test_every_continuation_begins_with_its_own_bos():
    rows = [tokens for tokens, _ in packing.pack(iter([list(range(10, 40))]), 8)]
    assert [row[0] for row in rows] == [BOS] * len(rows)
    assert np.concatenate([row[1:] for row in rows])[:30].tolist() == list(range(10, 40))


class Counted(list):
    """A document that counts the tokens copied out of it."""

    copied = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            Counted.copied += 1
            return found
        Counted.copied += len(found)
        return Counted(found)  # Tokens copied out of a copy count too.


def test_each_token_of_a_long_document_is_copied_once():
    document = Counted(range(10, 50_010))
    Counted.copied = 0
    rows = list(packing.pack(iter([document]), 64))
    assert len(rows) == 794 and Counted.copied <= 50_000


def test_with_the_chat_template_every_segment_is_a_whole_turn():
    before, after = chat.chat_template(tiny.load_tokenizer())
    documents = [list(range(300, 340)), list(range(400, 405)), list(range(500, 503))]
    rows = [tokens.tolist() for tokens, _ in packing.pack(iter(documents), 32, before, after)]
    assert sorted(t for row in rows for t in row if t >= 300) == sorted(t for d in documents for t in d)
    turns = 0
    for row in rows:
        starts = [i for i, token in enumerate(row) if token == masking.BOS]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            tokens = [token for token in row[start + 1 : end] if token != masking.PAD]
            assert tokens[: len(before)] == before and tokens[-len(after) :] == after
            assert min(tokens[len(before) : -len(after)]) >= 300
            turns += 1
    assert turns >= len(documents)


def test_turns_are_found_in_rows_of_several_documents():
    tokenizer = tiny.load_tokenizer()
    before, after = chat.chat_template(tokenizer)
    exchanges = [
        sources.Exchange("abc", "vwxyz"),
        sources.Exchange("d", "s" * 30),
        sources.Exchange("efgh", "t"),
    ]
    documents = (packing.encode(tokenizer, exchange, after) for exchange in exchanges)
    rows = np.stack([tokens for tokens, _ in packing.pack(documents, 40, before, after, is_cut=True)])
    for whose, letters in (("user", "abcdefgh"), ("model", "vwxyzst")):
        inside = chat.in_turns(tokenizer, whose)(rows)
        np.testing.assert_array_equal(inside, np.isin(rows, tiny.encode(letters)))
    assert (rows == tiny.encode("s")[0]).sum() == 40 - (
        1 + 3 + 1 + 5 + 5
    )  # The part of the long reply that fits in a row.
    with pytest.raises(ValueError, match="has prompts and replies; set data"):
        packing.encode(tokenizer, exchanges[0], [])


def test_order_is_a_permutation_of_each_epoch_and_depends_only_on_seed_and_place():
    first, second = token_rows.order(50, 3, 0, 50), token_rows.order(50, 3, 50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert token_rows.order(50, 3, 17, 20).tolist() == first[17:37].tolist()
    assert token_rows.order(50, 4, 0, 50).tolist() != first.tolist()


def test_a_glob_can_cross_folders_and_a_name_can_contain_brackets(tmp_path):
    for name in ("a/x.txt", "b/c/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "[1].txt").write_text("brackets")
    assert list(sources.documents(f"{tmp_path}/**/*.txt")) == ["brackets", "a/x.txt", "b/c/y.txt"]
    assert list(sources.documents(f"{tmp_path}/*/x.txt")) == ["a/x.txt"]
    assert list(sources.documents(f"{tmp_path}/[1].txt")) == ["brackets"]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_tfds_dataset_is_read_by_name_in_the_order_of_its_files(tmp_path, file_format):
    tfds.dataset_builders.store_as_tfds_dataset(
        name=f"words_{file_format}",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_datasets={"train": [(i, {"text": text}) for i, text in enumerate(texts())]},
        data_dir=tmp_path,
        file_format=file_format,
        disable_shuffling=True,
    )
    tfds.core.add_data_dir(tmp_path)
    name = f"tfds:words_{file_format}:1.0.0/train"
    assert list(sources.documents(name)) == texts()
    assert list(sources.documents(f"{name}[:3]")) == texts()[:3]
    with pytest.raises(ValueError, match="TFDS cannot read tfds:words_nowhere/train"):
        list(sources.documents("tfds:words_nowhere/train"))


def test_invalid_texts_of_tfds_are_refused_with_their_number(tmp_path):
    text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
    for name, feature, column, values, message in (
        ("latin", text, "text", ["a", b"\xe9"], "latin:1.0.0/train, example 1 is not in UTF-8"),
        (
            "numbers",
            number,
            "text",
            [5],
            r"numbers:1.0.0/train, example 0: the text is .*5\)?, expected a string",
        ),
        (
            "others",
            text,
            "words",
            ["a"],
            "TFDS cannot read .*others:1.0.0/train .its examples have no 'text'",
        ),
    ):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict({column: feature}),
            split_datasets={"train": [(i, {column: value}) for i, value in enumerate(values)]},
            data_dir=tmp_path,
            file_format="array_record",
            disable_shuffling=True,
        )
        tfds.core.add_data_dir(tmp_path)
        with pytest.raises(ValueError, match=message):
            list(sources.documents(f"tfds:{name}:1.0.0/train"))


def test_the_held_out_documents_of_the_default_corpus_never_change():
    """The README's numbers are measured on these documents."""
    config = config_lib.DataConfig()
    assert len(list(sources.documents(config.text))) == 249
    held_out = [i for i in range(249) if packing.is_held_out(config, i)]
    assert len(held_out) == 24 and held_out[:6] == [2, 7, 29, 38, 53, 66]


def test_only_names_of_prepared_rows_are_opened(tmp_path, monkeypatch):
    """Any other name, from an untrusted file, could be a folder whose code TFDS runs."""
    here = tmp_path / "rows_0123456789abcdef" / "1.0.0"
    here.mkdir(parents=True)
    monkeypatch.setattr(token_rows, "damage", lambda folder: None)  # Only the name matters here.
    config = config_lib.DataConfig(folder=str(tmp_path / "inner"))
    (tmp_path / "inner").symlink_to(tmp_path)
    assert token_rows.cached(config, "rows_0123456789abcdef") is not None
    for name in (str(here.parent), "../rows_0123456789abcdef", "rows_0123456789abcdef/", ""):
        assert token_rows.cached(config, name) is None


def test_prompts_are_read_from_files(tmp_path):
    path = tmp_path / "a.txt"
    # A prompt can contain characters that Python treats as line ends.
    path.write_bytes("one \r\n\n  \ntwo\u2028still\x0ctwo\n".encode())
    assert sources.read_prompts(path) == ["one ", "two\u2028still\x0ctwo"]
    (tmp_path / "a.jsonl").write_text('{"text": "a\\nb"}\n{"text": "c"}\n')
    assert sources.read_prompts(tmp_path / "a.jsonl") == ["a\nb", "c"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "turns.jsonl").write_text('{"text": "a"}\n{"prompt": "b", "text": "c"}\n')
    for name, message in (
        ("none.txt", "there is no file"),
        ("empty.txt", "has no prompts"),
        ("latin.txt", "is not in UTF-8"),
        ("turns.jsonl", 'has a "prompt" beside a "text"'),
    ):
        with pytest.raises(ValueError, match=message):
            sources.read_prompts(tmp_path / name)


def test_rows_that_the_chat_template_fills_are_refused():
    with pytest.raises(ValueError, match=r"data.context_length is 6, but BOS and the chat .* take 6 tokens"):
        list(packing.pack(iter([[7, 8]]), 6, before=[3, 4, 5], after=[9, 9]))
    assert len(list(packing.pack(iter([[7, 8]]), 7, before=[3, 4, 5], after=[9, 9]))) == 2
