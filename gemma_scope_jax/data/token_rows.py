"""Packed rows of tokens on disk, read by random access.

The order of rows is a pure function of the seed and a running index, so no state of reading is ever saved.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import grain
import numpy as np
from array_record.python import array_record_module

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import DataError, InputError
from gemma_scope_jax.runtime.printing import printable, quoted
from gemma_scope_jax.runtime.reporting import say

TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens [S, L], with the index in the dataset and the first document of each row [S]."""

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
        """The rows at `indices`, in that order.

        Raises:
          ValueError: if a row is damaged or cannot be read.
        """
        try:
            examples = [self.source[int(i)] for i in indices]
        except Exception as error:  # ArrayRecord raises errors of many kinds.
            reason = printable(" ".join(str(error).split()), 200)
            raise DataError(
                f"cannot read the rows in {self.folder} ({reason}); if they are damaged, remove the folder to "
                "rebuild them"
            ) from error
        return Batch(
            tokens=np.stack([e["tokens"] for e in examples]).astype(np.int32),
            row=np.asarray(indices, np.int32),
            first_document=np.array([e["first_document"] for e in examples], np.int32),
        )


def order(num_rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Row indices at places start … start + count of the training order; each epoch is reshuffled."""
    shuffled = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()
    return np.array([shuffled[i] for i in range(start, start + count)])


def open_rows(folder: pathlib.Path, split: str) -> Rows:
    """Opens one split of a dataset that `prepare.prepare_rows` stored.

    Raises:
      ValueError: if there is no such split, it has no rows, or the dataset is damaged.
    """
    import tensorflow_datasets as tfds  # Slow to import, and not needed for custom rows.

    if why := damage(folder):
        raise DataError(f"cannot read the rows in {folder} ({why}); remove the folder to rebuild them")
    builder = tfds.builder_from_directory(folder)
    if split not in (TRAIN, HELD_OUT):
        raise InputError(f"the rows have no split {quoted(split)}; choose {HELD_OUT} or {TRAIN}")
    if split not in builder.info.splits:
        raise DataError(f"{folder} has no {split} rows: all of its documents are in the other split")
    return Rows(builder.as_data_source(split), folder)


def damage(folder: pathlib.Path) -> str | None:
    """Why a stored dataset is damaged: its metadata or some rows are missing; None if it is not damaged.

    Raises:
      PermissionError: if it cannot be read, which does not mean that it is damaged.
    """
    import tensorflow_datasets as tfds

    files.check_readable(folder)
    try:
        for split in tfds.builder_from_directory(folder).info.splits.values():
            for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
                found = array_record_module.ArrayRecordReader(str(path)).num_records()
                if found != count:
                    return f"{path.name} has {found} rows, expected {count}"
    except Exception as error:  # TFDS and ArrayRecord raise errors of many kinds.
        return printable(" ".join(str(error).split()), 200)
    return None


def name_of(folder: pathlib.Path) -> str:
    """The name of a stored dataset, which identifies its text, tokenizer, packing and split."""
    return folder.parent.name


def is_name(name: str) -> bool:
    """Whether a string is the name of a stored dataset."""
    return re.fullmatch(r"rows_[0-9a-f]{16}", name) is not None


def cached(config: config_lib.DataConfig, name: str) -> pathlib.Path | None:
    """The folder of a stored dataset, by its name; None if it is missing or damaged.

    Any other name is refused with None: it can come from someone else's file, and TFDS runs code that a dataset's
    folder names.
    """
    if not is_name(name):
        return None
    folder = files.expanded(config.folder) / name / "1.0.0"
    if not folder.exists():
        return None
    if why := damage(folder):
        say(f"The rows in {folder} are damaged ({why}); rebuilding them.")
        return None
    return folder


def recorded(workdir: pathlib.Path) -> str | None:
    """The name of the rows that the run in `workdir` was started with; None if none is recorded.

    Raises:
      ValueError: if the record is not a name of rows.
    """
    record = workdir / "rows"
    if not record.exists():
        return None
    with files.reading(record):
        name = record.read_text(encoding="utf-8").strip()
        if not is_name(name):
            raise DataError(
                "it does not name packed rows; remove it to use the rows of the current data.text"
            )
    return name
