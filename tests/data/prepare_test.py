"""Rows hold every document once, with any number of workers and interruptions."""

import dataclasses
import gzip
import json
import signal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from samples import decode, texts, unpack

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import prepare, sources, token_rows


def config(tmp_path, text, **changes):
    return dataclasses.replace(
        config_lib.DataConfig(
            text=str(text), context_length=16, held_out_fraction=0.3, folder=str(tmp_path / "rows")
        ),
        **changes,
    )


def write_sources(tmp_path):
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts()):
        (tmp_path / "txt" / f"{i:02}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in texts()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts()}), tmp_path / "a.parquet")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    names = ("txt/*.txt", "a.jsonl", "a.parquet", "a.json.gz")
    return [tmp_path / name for name in names]


def test_a_row_must_have_room_for_the_chat_template(tmp_path):
    short = config_lib.DataConfig(
        text=str(write_sources(tmp_path)[0]), context_length=9, chat_template=True, folder=str(tmp_path)
    )
    with pytest.raises(ValueError, match="context_length 9 leaves no room for text beside the chat template"):
        prepare.prepare_rows(short, tiny.load_tokenizer, "bytes")


def test_every_source_has_the_same_rows_and_splits_share_no_document(tmp_path):
    found = []
    for source in write_sources(tmp_path):
        assert list(sources.documents(str(source))) == texts()
        folder = prepare.prepare_rows(config(tmp_path, source), tiny.load_tokenizer, "bytes")
        splits = {}
        for split in (token_rows.TRAIN, token_rows.HELD_OUT):
            rows = token_rows.open_rows(folder, split)
            batch = rows.read(np.arange(len(rows)))
            assert batch.row.tolist() == list(range(len(rows)))
            pairs = zip(batch.tokens, batch.first_document, strict=True)
            splits[split] = [decode(tokens) for tokens in unpack(pairs).values()]
        assert sorted(splits[token_rows.TRAIN] + splits[token_rows.HELD_OUT]) == sorted(texts())
        assert splits[token_rows.TRAIN] and splits[token_rows.HELD_OUT]
        found.append(splits)
    assert found[0] == found[1] == found[2] == found[3]


def read_all(folder):
    found = {}
    for split in (token_rows.TRAIN, token_rows.HELD_OUT):
        rows = token_rows.open_rows(folder, split)
        batch = rows.read(np.arange(len(rows)))
        found[split] = [tuple(row) for row in batch.tokens.tolist()], batch.first_document.tolist()
    return found


def test_rows_do_not_depend_on_the_number_of_workers_or_on_interruptions(tmp_path, monkeypatch):
    source = write_sources(tmp_path)[1]
    folders = [dataclasses.replace(config(tmp_path, source), folder=str(tmp_path / n)) for n in "abcd"]
    whole = read_all(prepare.prepare_rows(folders[0], tiny.load_tokenizer, "bytes", workers=2))
    monkeypatch.setattr(prepare, "PART", 3)
    one = read_all(prepare.prepare_rows(folders[1], tiny.load_tokenizer, "bytes", workers=1))
    two = read_all(prepare.prepare_rows(folders[3], tiny.load_tokenizer, "bytes", workers=2))
    assert one == two and one[token_rows.TRAIN][1][-1] >= 15
    # Each part is packed on its own, so rows differ from those of one part; documents do not.
    assert {decode(t) for t in unpack(zip(*one[token_rows.TRAIN], strict=True)).values()} == {
        decode(t) for t in unpack(zip(*whole[token_rows.TRAIN], strict=True)).values()
    }

    write, calls = prepare._write_part, []

    def stop_at_the_fourth(*args):
        calls.append(args[3])
        if args[3] == 9:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_write_part", stop_at_the_fourth)
        prepare.prepare_rows(folders[2], tiny.load_tokenizer, "bytes", workers=1)
    assert calls == [0, 3, 6, 9]
    done = sorted((tmp_path / "c").rglob("from-*.json"))
    before = [path.stat().st_mtime_ns for path in done]
    folder = prepare.prepare_rows(folders[2], tiny.load_tokenizer, "bytes", workers=1)
    assert read_all(folder) == one
    done = [folder / path.name for path in done]
    assert [path.stat().st_mtime_ns for path in done] == before and len(done) == 3


def test_a_damaged_part_is_rebuilt_with_a_message(tmp_path, monkeypatch, capsys):
    source = write_sources(tmp_path)[1]
    monkeypatch.setattr(prepare, "PART", 3)
    want = read_all(prepare.prepare_rows(config(tmp_path, source), tiny.load_tokenizer, "bytes", workers=1))
    cut = dataclasses.replace(config(tmp_path, source), folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_write_metadata", lambda *_: signal.raise_signal(signal.SIGINT))
        prepare.prepare_rows(cut, tiny.load_tokenizer, "bytes", workers=1)
    (partial,) = (tmp_path / "cut").glob("*/partial")
    done = sorted(partial.glob("from-*.json"))
    train = sorted(partial.glob("train.from-*"))
    assert len(done) == len(train) >= 5
    done[0].write_text('{"train": ')
    done[1].write_text("[]")
    train[2].unlink()
    train[3].write_bytes(train[3].read_bytes()[:-70_000])
    capsys.readouterr()
    assert read_all(prepare.prepare_rows(cut, tiny.load_tokenizer, "bytes", workers=1)) == want
    assert capsys.readouterr().out.count("damaged; rebuilding this part.") == 4


def test_a_limit_keeps_only_the_first_documents(tmp_path):
    source = write_sources(tmp_path)[1]
    few = read_all(prepare.prepare_rows(config(tmp_path, source, documents=5), tiny.load_tokenizer, "bytes"))
    kept = [decode(t) for split in few.values() for t in unpack(zip(*split, strict=True)).values()]
    assert sorted(kept) == sorted(texts(5))


def test_rows_are_prepared_once_and_again_when_the_text_changes(tmp_path):
    source = write_sources(tmp_path)[1]
    calls = []

    def load_tokenizer():
        calls.append("loaded")
        return tiny.load_tokenizer()

    folder = prepare.prepare_rows(config(tmp_path, source), load_tokenizer, "bytes")
    assert (
        prepare.prepare_rows(config(tmp_path, source), load_tokenizer, "bytes") == folder and len(calls) == 1
    )
    source.write_text(source.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert prepare.prepare_rows(config(tmp_path, source), load_tokenizer, "bytes") != folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "matches no file"),
        ("empty.jsonl", "", "leaves no document for the train split"),
        ("one.jsonl", '{"text": "a single document"}', "leaves no document for the held_out split"),
        (
            "one.txt",
            "a single document",
            r"no document to hold out: .*one.txt is one document; .* give a .jsonl",
        ),
        ("bad.jsonl", '{"text": "fine"}\n{"txt": 1}\n', 'bad.jsonl:2 is not a JSON object with a "text"'),
        ("null.jsonl", '{"text": null}\n', "null.jsonl:1: the text is None, expected a string"),
        ("bad.csv", "a,b", "only .txt, .jsonl, .jsonl.gz, .json.gz and .parquet"),
    ],
)
def test_bad_text_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare.prepare_rows(config(tmp_path, tmp_path / name), tiny.load_tokenizer, "bytes")


def test_a_single_txt_is_reported_as_one_document(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a single document")
    for text, is_said in ((tmp_path / "a.txt", True), (tmp_path / "*.txt", False)):
        held_out = config(tmp_path, text, held_out_fraction=1.0)
        prepare.prepare_rows(held_out, tiny.load_tokenizer, "bytes")
        assert ("a.txt is one document; for several, give a .jsonl" in capsys.readouterr().out) == is_said


def repeated(folder):
    """A text whose rows fill more than one block of a file."""
    text = folder / "a.jsonl"
    text.write_text("".join(json.dumps({"text": t * 30}) + "\n" for t in texts()))
    return text


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("dataset_info.json", None), ("dataset_info.json", 0), ("dataset_info.json", 90), ("features.json", None),
        ("features.json", 9), ("*train*array_record*", None), ("*train*array_record*", 0),
        ("*train*array_record*", 2**16), ("*train*array_record*", 2**16 + 9),
    ],
)  # fmt: skip
def test_damaged_rows_are_rebuilt_with_a_message(tmp_path, capsys, name, keep):
    c = config(tmp_path, repeated(tmp_path))
    folder = prepare.prepare_rows(c, tiny.load_tokenizer, "bytes")
    whole = read_all(folder)
    (path,) = folder.glob(name)
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="remove the folder to rebuild them") as caught:
        token_rows.open_rows(folder, token_rows.TRAIN)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 480
    capsys.readouterr()
    assert token_rows.cached(c, token_rows.name_of(folder)) is None
    assert f"{folder} are damaged" in capsys.readouterr().out
    assert read_all(prepare.prepare_rows(c, tiny.load_tokenizer, "bytes")) == whole


def test_a_damaged_row_is_an_error_that_names_the_folder(tmp_path):
    folder = prepare.prepare_rows(config(tmp_path, repeated(tmp_path)), tiny.load_tokenizer, "bytes")
    (path,) = folder.glob("*train*array_record*")
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the rows in .*remove the folder to rebuild them"):
        read_all(folder)


def test_rows_are_read_from_a_read_only_cache(tmp_path, as_any_user):
    c = config(tmp_path, repeated(tmp_path))
    folder = prepare.prepare_rows(c, tiny.load_tokenizer, "bytes")
    whole = read_all(folder)
    inside = [folder, folder.parent, folder.parent.parent]
    for path in inside:
        path.chmod(0o555)
    try:
        assert read_all(prepare.prepare_rows(c, tiny.load_tokenizer, "bytes")) == whole
        with pytest.raises(PermissionError, match="rows"):
            prepare.prepare_rows(dataclasses.replace(c, seed=1), tiny.load_tokenizer, "bytes")
        (path,) = folder.glob("*train*array_record*")
        path.chmod(0)
        # The rows are not damaged, so they are not rebuilt.
        with pytest.raises(PermissionError, match=path.name):
            prepare.prepare_rows(c, tiny.load_tokenizer, "bytes")
    finally:
        for path in inside:
            path.chmod(0o755)
