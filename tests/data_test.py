"""Text becomes packed rows that keep what they must, in an order that depends on nothing but a seed."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import tiny

from gemma_scope_jax import data, gemma
from gemma_scope_jax.gemma import BOS, PAD


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


@pytest.mark.parametrize("length", [8, 32, 100])
def test_packing_loses_nothing_and_numbers_documents(length):
    rng = np.random.default_rng(0)
    documents = [
        list(map(int, rng.integers(3, 99, size=n))) for n in [5, 300, 1, 0, 31, 32, 33, 64, 2, 2, 2, 50]
    ]
    rows = list(data.pack(iter(documents), length))
    assert all(tokens.shape == (length,) and tokens[0] == BOS for tokens, _ in rows)
    kept = [tokens for tokens in documents if tokens]
    assert unpack(rows) == dict(enumerate(kept))
    padding = np.mean([tokens == PAD for tokens, _ in rows])
    assert padding < 0.2


def test_every_continuation_begins_with_its_own_bos():
    rows = [tokens for tokens, _ in data.pack(iter([list(range(10, 40))]), 8)]
    assert [row[0] for row in rows] == [BOS] * len(rows)
    assert np.concatenate([row[1:] for row in rows])[:30].tolist() == list(range(10, 40))


def test_in_the_chat_template_every_segment_is_a_whole_turn():
    before, after = data.chat_template(tiny.load_tokenizer())
    documents = [list(range(300, 340)), list(range(400, 405)), list(range(500, 503))]
    rows = [tokens.tolist() for tokens, _ in data.pack(iter(documents), 32, before, after)]
    assert sorted(t for row in rows for t in row if t >= 300) == sorted(t for d in documents for t in d)
    turns = 0
    for row in rows:
        starts = [i for i, token in enumerate(row) if token == gemma.BOS]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            tokens = [token for token in row[start + 1 : end] if token != gemma.PAD]
            assert tokens[: len(before)] == before and tokens[-len(after) :] == after
            assert min(tokens[len(before) : -len(after)]) >= 300
            turns += 1
    assert turns >= len(documents)


def test_a_row_must_have_room_for_the_chat_template(tmp_path):
    short = data.DataConfig(
        text=str(write_sources(tmp_path)[0]), context_length=9, chat_template=True, folder=str(tmp_path)
    )
    with pytest.raises(ValueError, match="context_length 9 leaves no room in the chat template"):
        data.prepare(short, tiny.load_tokenizer, "bytes")


def test_order_is_a_permutation_of_each_epoch_and_depends_only_on_seed_and_place():
    first, second = data.order(50, 3, 0, 50), data.order(50, 3, 50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert data.order(50, 3, 17, 20).tolist() == first[17:37].tolist()
    assert data.order(50, 4, 0, 50).tolist() != first.tolist()


def config(tmp_path, text, **changes):
    return dataclasses.replace(
        data.DataConfig(
            text=str(text), context_length=16, held_out_fraction=0.3, folder=str(tmp_path / "rows")
        ),
        **changes,
    )


def texts(count=20):
    return [f"document {i} says {i * i}" for i in range(count)]


def write_sources(tmp_path):
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts()):
        (tmp_path / "txt" / f"{i:02}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in texts()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts()}), tmp_path / "a.parquet")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    names = ("txt/*.txt", "a.jsonl", "a.parquet", "a.json.gz")
    return [tmp_path / name for name in names]


def decode(tokens):
    return bytes(t - 3 for t in tokens).decode()


def test_every_source_gives_the_same_rows_and_splits_share_no_document(tmp_path):
    found = []
    for source in write_sources(tmp_path):
        assert list(data.documents(str(source))) == texts()
        folder = data.prepare(config(tmp_path, source), tiny.load_tokenizer, "bytes")
        splits = {}
        for split in (data.TRAIN, data.HELD_OUT):
            rows = data.open_rows(folder, split)
            batch = rows.read(np.arange(len(rows)))
            assert batch.row.tolist() == list(range(len(rows)))
            pairs = zip(batch.tokens, batch.first_document, strict=True)
            splits[split] = [decode(tokens) for tokens in unpack(pairs).values()]
        assert sorted(splits[data.TRAIN] + splits[data.HELD_OUT]) == sorted(texts())
        assert splits[data.TRAIN] and splits[data.HELD_OUT]
        found.append(splits)
    assert found[0] == found[1] == found[2] == found[3]


def test_a_glob_may_cross_folders_and_a_name_may_hold_brackets(tmp_path):
    for name in ("a/x.txt", "b/c/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "[1].txt").write_text("brackets")
    assert list(data.documents(f"{tmp_path}/**/*.txt")) == ["brackets", "a/x.txt", "b/c/y.txt"]
    assert list(data.documents(f"{tmp_path}/*/x.txt")) == ["a/x.txt"]
    assert list(data.documents(f"{tmp_path}/[1].txt")) == ["brackets"]


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
    assert list(data.documents(name)) == texts()
    assert list(data.documents(f"{name}[:3]")) == texts()[:3]
    with pytest.raises(ValueError, match="TFDS cannot give tfds:words_nowhere/train"):
        list(data.documents("tfds:words_nowhere/train"))


def read_all(folder):
    found = {}
    for split in (data.TRAIN, data.HELD_OUT):
        rows = data.open_rows(folder, split)
        batch = rows.read(np.arange(len(rows)))
        found[split] = [tuple(row) for row in batch.tokens.tolist()], batch.first_document.tolist()
    return found


def test_rows_do_not_depend_on_how_many_work_on_them_nor_on_interruptions(tmp_path, monkeypatch):
    source = write_sources(tmp_path)[1]
    folders = [dataclasses.replace(config(tmp_path, source), folder=str(tmp_path / n)) for n in "abcd"]
    whole = read_all(data.prepare(folders[0], tiny.load_tokenizer, "bytes", workers=2))
    monkeypatch.setattr(data, "PART", 3)
    one = read_all(data.prepare(folders[1], tiny.load_tokenizer, "bytes", workers=1))
    two = read_all(data.prepare(folders[3], tiny.load_tokenizer, "bytes", workers=2))
    assert one == two and one[data.TRAIN][1][-1] >= 15
    # Parts are packed by themselves, so rows differ from those of one part; documents do not.
    assert {decode(t) for t in unpack(zip(*one[data.TRAIN], strict=True)).values()} == {
        decode(t) for t in unpack(zip(*whole[data.TRAIN], strict=True)).values()
    }

    write, calls = data._write_part, []

    def stop_at_the_fourth(*args):
        calls.append(args[3])
        if args[3] == 9:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_write_part", stop_at_the_fourth)
        data.prepare(folders[2], tiny.load_tokenizer, "bytes", workers=1)
    assert calls == [0, 3, 6, 9]
    done = sorted((tmp_path / "c").rglob("from-*.json"))
    before = [path.stat().st_mtime_ns for path in done]
    folder = data.prepare(folders[2], tiny.load_tokenizer, "bytes", workers=1)
    assert read_all(folder) == one
    done = [folder / path.name for path in done]
    assert [path.stat().st_mtime_ns for path in done] == before and len(done) == 3


def test_only_the_first_documents_are_taken_where_a_number_is_given(tmp_path):
    source = write_sources(tmp_path)[1]
    few = read_all(data.prepare(config(tmp_path, source, documents=5), tiny.load_tokenizer, "bytes"))
    kept = [decode(t) for split in few.values() for t in unpack(zip(*split, strict=True)).values()]
    assert sorted(kept) == sorted(texts(5))


def test_rows_are_prepared_once_and_again_when_the_text_changes(tmp_path):
    source = write_sources(tmp_path)[1]
    calls = []

    def load_tokenizer():
        calls.append("loaded")
        return tiny.load_tokenizer()

    folder = data.prepare(config(tmp_path, source), load_tokenizer, "bytes")
    assert data.prepare(config(tmp_path, source), load_tokenizer, "bytes") == folder and len(calls) == 1
    source.write_text(source.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert data.prepare(config(tmp_path, source), load_tokenizer, "bytes") != folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "matches no file"),
        ("empty.txt", "", "leaves no document for the train split"),
        ("one.txt", "a single document", "leaves no document for the held_out split"),
        ("bad.jsonl", '{"text": "fine"}\n{"txt": 1}\n', 'bad.jsonl:2 is not a JSON object with a "text"'),
        ("null.jsonl", '{"text": null}\n', "null.jsonl:1 is not a JSON object"),
        ("bad.csv", "a,b", "only .txt, .jsonl, .jsonl.gz and .parquet"),
    ],
)
def test_bad_text_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        data.prepare(config(tmp_path, tmp_path / name), tiny.load_tokenizer, "bytes")


def test_the_held_out_documents_of_the_default_corpus_never_change():
    """The README's numbers are measured on them."""
    config = data.DataConfig()
    assert len(list(data.documents(config.text))) == 249
    held_out = [i for i in range(249) if data.is_held_out(config, i)]
    assert len(held_out) == 24 and held_out[:6] == [2, 7, 29, 38, 53, 66]
