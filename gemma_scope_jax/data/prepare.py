"""Tokenises text into packed rows, in parallel parts, and stores them once as an ArrayRecord TFDS dataset."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
from array_record.python import array_record_module

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.config import DataConfig
from gemma_scope_jax.data.packing import encode, is_held_out, pack
from gemma_scope_jax.data.sources import Exchange, documents, fingerprint, only_document
from gemma_scope_jax.data.token_rows import HELD_OUT, TRAIN, cached, name_of, recorded
from gemma_scope_jax.models import tokenizer, weights
from gemma_scope_jax.models.chat import chat_template
from gemma_scope_jax.models.tokenizer import Tokenizer
from gemma_scope_jax.runtime import distributed, reporting
from gemma_scope_jax.runtime.errors import DataError
from gemma_scope_jax.runtime.files import expanded, read_json, replacing_file
from gemma_scope_jax.runtime.locks import locked
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say

# Documents in a part. Each part is tokenised and packed independently, into its own files.
PART = 2**14


def prepare_rows(
    config: DataConfig,
    load_tokenizer: Callable[[], Tokenizer],
    tokenizer_name: str,
    workers: int | None = None,
) -> pathlib.Path:
    """Tokenises and packs the text of `config` unless its rows are stored; returns the dataset's folder.

    The text is processed in parallel, in parts of `PART` documents. After an interruption, the next call reuses the
    finished parts. The rows do not depend on the number of workers.

    Args:
      config: the text and how it is packed.
      load_tokenizer: called only if there is text to tokenise, since it takes seconds; with more than one part, each
        worker process calls it too.
      tokenizer_name: a name that changes whenever the tokenizer changes.
      workers: the number of processes; None: one per core.

    Raises:
      ValueError: if the text cannot be found, or a split would be empty (with a fraction of 1, the held-out split).
    """
    identity = json.dumps(
        [
            fingerprint(config.text),
            config.context_length,
            config.held_out_fraction,
            config.seed,
            tokenizer_name,
            *(["chat_template"] if config.chat_template else []),
            *([config.documents] if config.documents else []),
        ]
    )
    name = f"rows_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    root = expanded(config.folder)
    if (folder := cached(config, name)) is not None:
        return folder

    only = only_document(config.text)
    several = f"{only} is one document; for several, give a .jsonl file with one per line, or several files"
    if only and config.held_out_fraction < 1:
        raise DataError(f"data.text has no document to hold out: {several}")
    tokenizer = load_tokenizer()
    before, after = chat_template(tokenizer) if config.chat_template else ([], [])
    if len(before) + len(after) + 2 > config.context_length:
        raise DataError(
            f"data.context_length {config.context_length} leaves no room for text beside the chat template"
        )
    told = printable(f". {several}", 480) if only else ""
    say(f"Tokenising {printable(config.text)} into rows of {config.context_length} tokens{told}.")
    busy = f"Another process is preparing the same text in {root / name}; waiting for it."
    with locked(root / name / ".lock", busy, waits=True):
        return cached(config, name) or _prepare(config, tokenizer, load_tokenizer, name, identity, workers)


def _prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    load_tokenizer: Callable[[], Tokenizer],
    name: str,
    identity: str,
    workers: int | None,
) -> pathlib.Path:
    folder = expanded(config.folder) / name / "1.0.0"
    partial = folder.with_name("partial")
    partial.mkdir(exist_ok=True)
    lengths = _write_parts(config, tokenizer, load_tokenizer, partial, workers or os.cpu_count())
    for split in (TRAIN, HELD_OUT):
        is_wanted = config.held_out_fraction < 1 or split == HELD_OUT
        if is_wanted and not sum(of_part[split] for of_part in lengths):
            raise DataError(
                f"data.text {config.text!r} leaves no document for the {split} split at "
                f"data.held_out_fraction {config.held_out_fraction}; give more documents or another fraction"
            )
    _write_metadata(partial, name, config, lengths, f"Packed token rows: {identity}")
    if folder.exists():  # It is damaged: `cached` refused it.
        shutil.rmtree(folder)
    return partial.rename(folder)


def _write_parts(
    config: DataConfig,
    tokenizer: Tokenizer,
    load_tokenizer: Callable[[], Tokenizer],
    folder: pathlib.Path,
    workers: int,
) -> list[dict[str, int]]:
    """Writes every part that is not finished; returns the number of rows of each split, by part."""
    texts = itertools.islice(documents(config.text), config.documents or None)
    parts = ((n * PART, list(part)) for n, part in enumerate(itertools.batched(texts, PART)))
    head = list(itertools.islice(parts, 2))
    parts = itertools.chain(head, parts)
    if len(head) < 2 or workers == 1:
        return [_write_part(config, tokenizer, folder, *part) for part in parts]
    # Spawned, not forked: JAX may have started threads in this process.
    _start_tracker()
    spawn = multiprocessing.get_context("spawn")
    leash, ours = spawn.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _load_in_worker, (load_tokenizer, leash))
    lengths, running = [], collections.deque()
    with pool, reporting.bar("Tokenising", "part") as bar:

        def take() -> None:
            lengths.append(running.popleft().result())
            bar.update()

        try:
            for first, part in parts:
                if (done := _read_lengths(folder, first)) is not None:  # Its texts need not be sent.
                    running.append(concurrent.futures.Future())
                    running[-1].set_result(done)
                else:
                    with _interrupts_blocked():
                        running.append(pool.submit(_write_part_in_worker, config, folder, first, part))
                if len(running) > 2 * workers:  # Limits the text held in memory.
                    take()
            while running:
                take()
        except BaseException:
            ours.close()  # Ends the workers at once.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return lengths


def _start_tracker() -> None:
    """Starts, without its warnings, the tracker that frees the semaphores of a process that exits at once."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker"]))
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks Ctrl-C in processes started within it until they have loaded, so that they print no traceback."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_tokenizer_of_worker: Tokenizer | None = None


def _load_in_worker(
    load_tokenizer: Callable[[], Tokenizer], leash: multiprocessing.connection.Connection
) -> None:
    global _tokenizer_of_worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def end_with_parent() -> None:
        leash.poll(None)  # Returns once the parent has exited or closed its end.
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenizer_of_worker = load_tokenizer()


def _write_part_in_worker(
    config: DataConfig, folder: pathlib.Path, first: int, texts: list[str]
) -> dict[str, int]:
    return _make_part(config, _tokenizer_of_worker, folder, first, texts)


def _done_file(folder: pathlib.Path, first: int) -> pathlib.Path:
    """The file with the row counts of the part that begins with document `first`; written after its rows."""
    return folder / f"from-{first:010}.json"


def _read_lengths(folder: pathlib.Path, first: int) -> dict[str, int] | None:
    """The number of rows of each split in a part; None if it is unfinished, or damaged, which is logged."""
    done = _done_file(folder, first)
    if not done.exists():
        return None
    try:
        lengths = read_json(done)
        for split in (TRAIN, HELD_OUT):
            path = _part_file(folder, split, first)
            # If the final renaming was interrupted, some parts have their final names, and all are complete.
            if path.exists() or not any(folder.glob("*.array_record-*")):
                reader = array_record_module.ArrayRecordReader(str(path))
                if reader.num_records() != lengths[split]:
                    raise DataError(f"{path} has {reader.num_records()} rows, not {lengths[split]}")
    except (OSError, ValueError, KeyError, RuntimeError):
        say(f"{done} or its rows are damaged; rebuilding this part.")
        return None
    return lengths


def _part_file(folder: pathlib.Path, split: str, first: int) -> pathlib.Path:
    return folder / f"{split}.from-{first:010}"


def _write_part(
    config: DataConfig, tokenizer: Tokenizer, folder: pathlib.Path, first: int, texts: list[str]
) -> dict[str, int]:
    """Writes a part unless it is finished; returns the number of rows of each split."""
    done = _read_lengths(folder, first)
    return _make_part(config, tokenizer, folder, first, texts) if done is None else done


def _make_part(
    config: DataConfig, tokenizer: Tokenizer, folder: pathlib.Path, first: int, texts: list[str]
) -> dict[str, int]:
    """Writes the part that begins with document `first`, one file per split; returns the number of rows of each."""
    before, after = chat_template(tokenizer) if config.chat_template else ([], [])
    features, lengths = _features(config), {}
    # A continued reply would begin where a prompt belongs.
    is_cut = any(isinstance(text, Exchange) for text in texts)
    for split in (TRAIN, HELD_OUT):
        chosen = (
            encode(tokenizer, text, after)
            for index, text in enumerate(texts, first)
            if is_held_out(config, index) == (split == HELD_OUT)
        )
        lengths[split] = 0
        with replacing_file(_part_file(folder, split, first)) as path:
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for tokens, first_document in pack(chosen, config.context_length, before, after, is_cut):
                row = {"tokens": tokens, "first_document": first + first_document}
                writer.write(features.serialize_example(features.encode_example(row)))
                lengths[split] += 1
            writer.close()
    with replacing_file(_done_file(folder, first)) as path:
        path.write_text(json.dumps(lengths))
    return lengths


def _features(config: DataConfig) -> object:
    import tensorflow_datasets as tfds

    tokens = tfds.features.Tensor(shape=(config.context_length,), dtype=np.int32)
    return tfds.features.FeaturesDict({"tokens": tokens, "first_document": np.int32})


def _write_metadata(
    folder: pathlib.Path, name: str, config: DataConfig, lengths: list[dict[str, int]], description: str
) -> None:
    """Turns the parts into a TFDS dataset with one shard per part."""
    import tensorflow_datasets as tfds

    splits = []
    for split in (TRAIN, HELD_OUT):
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        filled = [part for part, of_part in enumerate(lengths) if of_part[split]]
        for shard, part in enumerate(filled):
            path = template.sharded_filepath(shard_index=shard, num_shards=len(filled))
            if not path.exists():  # It exists if this was interrupted before.
                _part_file(folder, split, part * PART).rename(path)
        shard_lengths = [lengths[part][split] for part in filled]
        if filled:  # TFDS does not accept an empty split.
            splits.append(tfds.core.SplitInfo(split, shard_lengths, num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(config),
        split_infos=splits,
        version="1.0.0",
        description=description,
        check_data=False,
    )


def rows_of(config: config_lib.Config, workers: int | None = None) -> pathlib.Path:
    """The folder of a config's packed rows, made if needed by `workers` processes; see `prepare_rows`."""
    load_tokenizer = functools.partial(tokenizer.load, config.model, config.tokenizer, config.weights)
    name = f"{config.model}:{weights.fingerprint(config.tokenizer or config.weights)}"
    return prepare_rows(config.data, load_tokenizer, name, workers)


def rows_of_once(config: config_lib.Config) -> pathlib.Path:
    """`rows_of`, first on the first process; the others then find the rows, if they use the same disk."""
    if distributed.is_first():
        rows_of(config)
    distributed.wait_for_all("rows are prepared")
    return rows_of(config)


def rows_of_run(config: config_lib.Config, workdir: pathlib.Path) -> pathlib.Path:
    """The folder of the rows that the run in `workdir` was started with, or those of a new run.

    Raises:
      ValueError: if those rows are no longer stored, and the text or tokenizer has changed since.
    """
    name = recorded(workdir)
    if name is not None and (folder := cached(config.data, name)) is not None:
        return folder
    folder = rows_of_once(config)
    if name not in (None, name_of(folder)):
        raise DataError(
            f"data.text {config.data.text!r} or the tokenizer has changed since this run was started, and its rows "
            f"({name}) are no longer in {config.data.folder}; restore the text, or start a new run"
        )
    return folder
