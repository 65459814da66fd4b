"""Valid and broken text files of many kinds; every reader of JSON Lines follows the same rules."""

import codecs
import gzip
import json
import pathlib
import re

import pyarrow
import pyarrow.parquet
import pytest

from gemma_scope_jax.data import sources
from gemma_scope_jax.evaluation import probing


def lines(*found, end="\n"):
    return "".join(json.dumps(one) + end for one in found).encode()


TWO = lines({"text": "é"}, {"text": "b"})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("mark.jsonl", codecs.BOM_UTF8 + TWO, ["é", "b"]),
        ("mark.txt", codecs.BOM_UTF8 + b"a", ["a"]),
        ("mark.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + TWO, mtime=0), ["é", "b"]),
        ("blank.jsonl", b"\n" + TWO.replace(b"\n", b"\n \t\n\n"), ["é", "b"]),
        ("crlf.jsonl", TWO.replace(b"\n", b"\r\n") + b"\r\n", ["é", "b"]),
        ("crlf.txt", b"a\r\nb\rc\n", ["a\nb\nc\n"]),
        ("no_end.jsonl", TWO.rstrip(b"\n"), ["é", "b"]),
        ("raw.jsonl", '{"text": "é\u2028\x85"}\n'.encode(), ["é\u2028\x85"]),
        ("halves.jsonl", b'{"text": "a\\ud83d b\\ude00 \\ud83d\\ude00"}', ["a\ufffd b\ufffd \U0001f600"]),
        ("nul.jsonl", b'{"text": "a\\u0000b"}', ["a\0b"]),
        (
            "turns.json.gz",
            gzip.compress(lines({"text": "b", "prompt": "a"}), mtime=0),
            [sources.Exchange("a", "b")],
        ),
        ("none.jsonl", b"", []),
    ],
)
def test_valid_files_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert list(sources.read(tmp_path / name)) == expected


BROKEN = {
    "latin.jsonl": (
        lines({"text": "a"}) + b'{"text": "\xe9"}',
        r"latin.jsonl:2 is not in UTF-8 .*; convert it",
    ),
    "latin.txt": (b"a\nb\xe9\n", r"latin.txt:2 is not in UTF-8"),
    "utf16.jsonl": (
        TWO.decode().encode("utf-16"),
        "utf16.jsonl is in UTF-16, or is not text; convert it to UTF-8",
    ),
    "utf16.txt": ("a\nb".encode("utf-16-le"), "utf16.txt is in UTF-16, or is not text"),
    "utf32.jsonl": (TWO.decode().encode("utf-32-be"), "utf32.jsonl is in UTF-16, or is not text"),
    "other.jsonl": (lines({"txt": 1}), 'other.jsonl:1 is not a JSON object with a "text"; it has txt'),
    "list.jsonl": (b"\n\n[1]\n", r"list.jsonl:3 is not a JSON object: it is \[1\]"),
    "null.jsonl": (lines({"text": None}), "null.jsonl:1: the text is None, expected a string"),
    "turn.jsonl": (lines({"text": "a", "prompt": 5}), "turn.jsonl:1: the prompt is 5, expected a string"),
    "cut.jsonl": (TWO[:-4], "cut.jsonl:2 is not a JSON object: Unterminated string"),
    "deep.jsonl": (b'{"text": ' + b"[" * 10**5, "deep.jsonl:1 is not a JSON object: .*recursion"),
    "cut.jsonl.gz": (
        gzip.compress(TWO, mtime=0)[:-9],
        "cannot read .*cut.jsonl.gz as gzip: Compressed file ended",
    ),
    "not.jsonl.gz": (TWO, "cannot read .*not.jsonl.gz as gzip: Not a gzipped file"),
    "bad.json.gz": (gzip.compress(TWO, mtime=0)[:20] + b"\0" * 30, "cannot read .*bad.json.gz as gzip: "),
    "not.parquet": (TWO, "cannot read .*not.parquet as Parquet: Parquet"),
    "big.jsonl": (
        lines({"text": ["x" * 10**6]}),
        "big.jsonl:1: the text is .* characters., expected a string",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_texts_are_reported_with_their_line(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(sources.read(tmp_path / name))
    assert len(str(caught.value)) < 480 + len(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None], "a.parquet, row 1: the text is None, expected a string"),
        ([["a"]], r"a.parquet, row 0: the text is \['a'\], expected a string"),
        ([b"a"], "a.parquet, row 0: the text is b'a', expected a string"),
        (pyarrow.array([b"a", b"\xe9"]).view(pyarrow.string()), "a.parquet, row 1 is not in UTF-8"),
    ],
)
def test_invalid_parquet_values_are_reported_with_their_row(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(sources.read(tmp_path / "a.parquet"))


def test_parquet_strings_can_have_any_type_and_a_truncated_file_is_reported(tmp_path):
    path, plain = tmp_path / "a.parquet", pyarrow.array(["a", "é", "a"])
    for column in (
        plain.cast(pyarrow.large_string()),
        plain.dictionary_encode(),
        plain.cast(pyarrow.string_view()),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "other": [1, 2, 3]}), path)
        assert list(sources.read(path)) == ["a", "é", "a"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*a.parquet as Parquet: "):
        list(sources.read(path))
    pyarrow.parquet.write_table(pyarrow.table({"words": plain}), path)
    with pytest.raises(ValueError, match=r"a.parquet as Parquet: it has no column 'text'; it has words"):
        list(sources.read(path))


def test_a_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 20)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}, {"text": "x" * 50}))
    (tmp_path / "a.txt").write_bytes(b"x" * 50)
    for name, message in (
        ("a.jsonl", "line 2 has more than 20 bytes"),
        ("a.txt", "it has 50 bytes, but at most 20"),
    ):
        with pytest.raises(ValueError, match=f"cannot read .*{re.escape(name)}: {message}"):
            list(sources.read(tmp_path / name))


def prompts(path: pathlib.Path) -> list[str]:
    return sources.read_prompts(path)


def labelled(path: pathlib.Path) -> list[str]:
    return probing.read_labelled(path).texts


def documents(path: pathlib.Path) -> list[str]:
    return list(sources.documents(str(path)))


@pytest.mark.parametrize("read", [documents, prompts, labelled])
def test_every_reader_of_json_lines_follows_the_same_rules(tmp_path, read):
    whole = [{"text": f"é{i}", "label": "ab"[i % 2]} for i in range(24)]
    content = (
        codecs.BOM_UTF8 + b"\n" + lines(*whole, end="\r\n\r\n") + b'{"text": "a\\ud800", "label": "a"}\n\n'
    )
    for name, written in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content, mtime=0))):
        (tmp_path / name).write_bytes(written)
        assert read(tmp_path / name) == [one["text"] for one in whole] + ["a\ufffd"]
    for name in ("latin.jsonl", "utf16.jsonl", "list.jsonl", "cut.jsonl.gz", "not.jsonl.gz", "deep.jsonl"):
        broken, message = BROKEN[name]
        if name == "latin.jsonl":
            broken = lines(whole[0]) + b'{"text": "\xe9"}'
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
