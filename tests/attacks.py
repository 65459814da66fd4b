"""Attacks on whole commands: kills, signals, damaged files, odd names, missing permissions, nonsense values.

    python tests/attacks.py NAME... [--seed=N] [--count=N] [--only=I]

Each attempt depends only on the seed and its number, so a failing attempt can be repeated. Without --seed, a random
seed is chosen and printed. The program counts the outcomes at the end; its exit code is 1 if any attempt broke.

Commands run in forks of this process, which has imported everything and never touches a device. So a command starts
in milliseconds instead of ten seconds.
"""

import argparse
import collections
import ctypes
import dataclasses
import faulthandler
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import tiny
from array_record.python import array_record_module

from gemma_scope_jax import config
from gemma_scope_jax.cli import common
from gemma_scope_jax.cli import main as commands
from gemma_scope_jax.runtime import files

warnings.filterwarnings("ignore", ".*fork", Warning)

LIMIT_S = 240  # A command that takes longer counts as hanging.
LONGEST_LINE = 500
SCRIPTS = ("train.py", "evaluate.py")


class Broken(Exception):
    """Raised when a command does something that it must never do."""


# Running commands in their own processes.


@dataclasses.dataclass
class Process:
    """A running command."""

    pid: int
    command: list[str]
    out: pathlib.Path
    err: pathlib.Path
    code: int | None = None

    def ends_within(self, seconds: float) -> bool:
        """Waits at most `seconds`; returns whether the command has ended."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.003)
        return True

    def send(self, number: int) -> None:
        if not self.ends_within(0):
            os.kill(self.pid, number)

    def outcome(self, seconds: float = LIMIT_S) -> str:
        """How the command ended: done, refused with one line, or by which signal.

        Raises:
          Broken: if the command hangs, crashes, or prints more than one line of error.
        """
        if not self.ends_within(seconds):
            os.kill(self.pid, signal.SIGABRT)  # faulthandler then prints where it hangs.
            self.ends_within(10) or os.kill(self.pid, signal.SIGKILL)
            raise Broken(f"{self.command} hangs: {self.tail()}")
        said = self.err.read_bytes().decode(errors="replace")
        if "Traceback" in said or "Exception ignored" in said or self.code == 134:
            raise Broken(f"{self.command} ends with {self.code} and a traceback: {self.tail()}")
        if self.code == 0:
            return "done"
        if self.code == -signal.SIGKILL or self.code in (129, 130, 143):
            return f"ended by {self.code}"
        refusals = re.findall(r"(?:^|\n)(?:[^\n]*: e|E)rror: ([^\n]*)\n?", said)
        if len(refusals) != 1 or self.code not in (1, 2):
            raise Broken(f"{self.command} ends with {self.code} and {len(refusals)} refusals: {self.tail()}")
        check_line(refusals[0])
        return "refused"

    def tail(self) -> str:
        said = self.err.read_bytes().decode(errors="replace") + self.out.read_bytes().decode(errors="replace")
        return "\n" + said[-3000:]


def check_line(line: str) -> None:
    """Raises Broken unless a message is one short line without control characters."""
    bad = [c for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    if not line.strip() or len(line) > LONGEST_LINE or bad:
        raise Broken(f"a message of {len(line)} characters, {bad[:5]} among them: {line[:600]!r}")


def start(
    command: Sequence[str],
    folder: pathlib.Path,
    stdout: int | None = None,
    before: Callable | None = None,
    is_joined: bool = False,
) -> Process:
    """Runs `SCRIPT ARGUMENTS` or a command of the package in a fork, with its output in files of `folder`.

    Args:
      command: the words of the command line.
      folder: the folder of the output files, also the working directory.
      stdout: a file descriptor that replaces the output file.
      before: a function that is called in the fork before the command.
      is_joined: whether stderr goes to the same place as stdout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.err")))
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    out.touch()
    err.touch()

    def work() -> None:
        os.dup2(stdout if stdout is not None else os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1 if is_joined else os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        os.chdir(folder)
        sys.stdout, sys.stderr = (
            open(fd, "w", buffering=1, errors=errors, encoding="utf-8")
            for fd, errors in ((1, "strict"), (2, "backslashreplace"))
        )
        name, rest = command[0], list(command[1:])
        words = [name.removesuffix(".py"), *rest]
        sys.argv = ["gemma-scope", *words]
        if before is not None:
            before()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        common.run(lambda: commands.run(words))

    return Process(forked(work), list(command), out, err)


def forked(work: Callable[[], None]) -> int:
    """Calls `work` in a fork of this process, which then exits as an interpreter does; returns the fork's id."""
    sys.stdout.flush()
    sys.stderr.flush()
    # A Ctrl-C in the fork must not run the cleanup that belongs to this process.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if pid := os.fork():
        signal.signal(signal.SIGINT, handler)
        return pid
    code = 120
    try:  # In the fork, no exception may leave this function.
        try:
            faulthandler.enable()
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run(command: Sequence[str], folder: pathlib.Path, **how: object) -> str:
    """Runs a command and returns its outcome."""
    return start(command, folder, **how).outcome()


def must(command: Sequence[str], folder: pathlib.Path, **how: object) -> None:
    """Runs a command that must succeed."""
    process = start(command, folder, **how)
    if process.outcome() != "done":
        raise Broken(f"{process.command} ends with {process.code}: {process.tail()}")


# The inputs and commands under attack.


@dataclasses.dataclass(frozen=True)
class Base:
    """A folder with inputs and the results of uninterrupted commands."""

    folder: pathlib.Path

    def seconds(self, kind: str) -> float:
        """The time that an uninterrupted command takes."""
        return json.loads((self.folder / "seconds.json").read_text())[kind]

    def config(self, workplace: pathlib.Path, **changes: object) -> str:
        """Writes the config of a small run, with its own cache of rows in `workplace`; returns the --config flag."""
        workplace.mkdir(parents=True, exist_ok=True)
        values = config.to_dict(
            tiny.run_config(self.folder, **{"data__folder": str(workplace / "rows"), **changes})
        )
        path = workplace / "config.py"
        path.write_text(
            "import json\nimport ml_collections\n\n\ndef get_config():\n"
            f"    return ml_collections.ConfigDict(json.loads({json.dumps(values)!r}))\n"
        )
        return f"--config={path}"


def make_inputs(folder: pathlib.Path) -> None:
    """Writes the small model's weights in several formats, and a text."""
    import pyarrow
    import pyarrow.parquet
    import weight_files

    tiny.lay_out(folder)
    weight_files.write_hugging_face(folder / "hugging_face", params=tiny.params())
    (folder / "gguf").mkdir()
    weight_files.write_gguf(folder / "gguf" / "tiny.gguf", params=tiny.params())
    texts = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), folder / "text.parquet")


def keep_parts() -> None:
    """Makes evaluations keep the results of each batch."""
    from gemma_scope_jax.runtime import resumable

    resumable.Parts.remove = lambda self: None


def lay_out(folder: pathlib.Path) -> Base:
    """Makes the inputs and a finished, evaluated run."""
    base = Base(folder)
    if (folder / "seconds.json").exists():
        return base
    folder.mkdir(parents=True, exist_ok=True)
    pid = forked(lambda: make_inputs(folder))
    assert os.waitpid(pid, 0)[1] == 0
    (folder / "prompts.txt").write_text("stars and\nlaws of bread\nsong\n")
    place = folder / "whole"
    seconds = {}
    for workplace in (folder / "compiling", place):  # In the second pass all programs are already compiled.
        for kind, words in COMMANDS.items():
            started = time.monotonic()
            must(words(base, workplace), workplace / "output" / kind)
            seconds[kind] = time.monotonic() - started
            if kind == "train" and workplace == place:
                shutil.copytree(place / "run", folder / "trained")
    print(", ".join(f"{kind} {s:.1f} s" for kind, s in seconds.items()), flush=True)
    process = start(_train(base, folder / "halving"), folder / "halving" / "output")
    log = folder / "halving/run/metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 25) and not process.ends_within(0.01):
        pass
    process.send(signal.SIGTERM)
    assert process.outcome() == "ended by 143", process.tail()
    (folder / "halving/run").rename(folder / "half")
    shutil.copytree(place / "run", folder / "whole/evaluated")
    shutil.copytree(folder / "trained", folder / "halving/run")
    for kind in ("evaluate", "dashboards"):
        must(COMMANDS[kind](base, folder / "halving"), folder / "halving/output", before=keep_parts)
    (folder / "halving/run").rename(folder / "parts")
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return base


def _train(base: Base, place: pathlib.Path) -> list[str]:
    flags = dict(train__tokens=128 * 40, log__checkpoint_every=7)
    return ["train.py", base.config(place, **flags), f"--workdir={place / 'run'}"]


# The command line of each kind in a workplace; all except prepare, train and generate read a finished run.
COMMANDS: dict[str, Callable[[Base, pathlib.Path], list[str]]] = {
    "prepare": lambda base, place: ["prepare", base.config(place)],
    "train": _train,
    # Before evaluate, because an evaluation changes the L0 in the names of an export.
    "export": lambda base, place: [
        "export", str(place / "run"), "--format=saelens,gemma_scope,gemma_scope_2,dictionary_learning",
        f"--out={place / 'exported'}",
    ],
    "evaluate": lambda base, place: ["evaluate.py", str(place / "run"), "--rows=6", "--rows_per_batch=2"],
    "dashboards": lambda base, place: ["dashboards", str(place / "run"), "--rows=6", "--rows_per_batch=2"],
    "generate": lambda base, place: [
        "generate", "--model=tiny", f"--weights={base.folder / 'weights'}", "--num_tokens=4",
        f"--prompts={base.folder / 'prompts.txt'}", f"--out={place / 'rollouts.jsonl'}",
    ],
}  # fmt: skip


def records(path: pathlib.Path) -> list[list[int]]:
    """The records of a file. Call it in a separate process: forks of a process that has read records crash."""
    return [sorted(record) for record in array_record_module.ArrayRecordReader(str(path)).read_all()]


def tree(folder: pathlib.Path) -> dict[str, object]:
    """The contents of a folder, without the parts that differ between identical runs."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name == ".lock" or re.search(r"tensorboard|\.html$|\.png$", name):
            continue
        content: object = hashlib.sha256(path.read_bytes()).hexdigest()
        if ".array_record" in path.name:  # TFDS writes the fields of a row in any order.
            with multiprocessing.get_context("fork").Pool(1) as pool:
                content = pool.apply(records, (path,))
        elif path.suffix == ".pt":  # The archive's members contain timestamps.
            with zipfile.ZipFile(path) as archive:
                content = [(info.filename, info.CRC) for info in archive.infolist()]
        elif path.name == "evaluation.json":
            content = {k: v for k, v in json.loads(path.read_text()).items() if k != "cost"}
        elif path.name == "metrics.jsonl":
            entries = map(json.loads, path.read_text().splitlines())
            content = [{k: v for k, v in entry.items() if k != "speed"} for entry in entries]
        elif "checkpoints" in path.parts:
            if path.parent.name != "about":
                continue
            if path.name == "metadata":
                content = json.loads(path.read_text())
                content = {"digests": content["digests"], "shapes": content["shapes"]}
            else:
                continue
        found[name] = content
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names of the entries that differ."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def leftovers(folder: pathlib.Path) -> list[str]:
    """Partial files of a killed process."""
    return [str(p) for p in folder.rglob(".*") if re.fullmatch(r"\..+\.\d+", p.name)]


# The attacks. Each makes one attempt, with a base, a random generator and an empty workplace; returns the outcome.


def killed_at_event(number: int) -> None:
    """Kills this process just before its `number`-th change on disk."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def prepared(base: Base, kind: str, place: pathlib.Path) -> None:
    """Copies a finished run into a workplace if the command needs one."""
    if kind not in ("prepare", "train", "generate"):
        shutil.copytree(base.folder / "trained", place / "run", symlinks=True)


def made(kind: str, place: pathlib.Path) -> dict[str, object]:
    """The results of a command in a workplace."""
    parts = {
        "prepare": "rows",
        "train": "run",
        "evaluate": "run",
        "export": "exported",
        "dashboards": "run/dashboards",
    }
    if kind == "generate":
        return {"rollouts": (place / "rollouts.jsonl").read_text()}
    return tree(place / parts[kind])


def kills(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Kills a command one to three times; then the same command must succeed with the same result."""
    kind = rng.choice(list(COMMANDS))
    prepared(base, kind, place)
    words, times = COMMANDS[kind](base, place), rng.choice((1, 1, 2, 3))
    killed = 0
    for _ in range(times):
        before = None
        if rng.random() < 0.6:
            event = round(
                100 ** rng.random()
            )  # Log-uniform, so that early events are tried as often as late ones.
            before = lambda event=event: killed_at_event(event)  # noqa: E731
        process = start(words, place / "output", before=before)
        if before is None:
            process.ends_within(rng.uniform(0, base.seconds(kind)))
            process.send(signal.SIGKILL)
        process.outcome()
        killed += process.code == -signal.SIGKILL
        whole_or_absent(base, kind, place)
        if process.code == 0:
            break
    # A command may refuse to overwrite a complete result.
    outcome = start(words, place / "output").outcome()
    if outcome != "done" and (outcome != "refused" or kind not in ("export", "generate")):
        raise Broken(f"{kind} is {outcome} after a kill")
    compare(base, kind, place)
    if left := leftovers(place):
        raise Broken(f"{kind} leaves {left}")
    return f"{kind}: {'killed, then done' if killed else 'done before the kill'}"


def whole_or_absent(base: Base, kind: str, place: pathlib.Path) -> None:
    """Raises Broken if an export under its final name is incomplete."""
    if kind == "export" and (place / "exported").exists():
        expected, found = made("export", base.folder / "whole"), made("export", place)
        for folder in {str(pathlib.PurePath(name).parent) for name in found if not is_partial(name)}:
            of = [{k: v for k, v in each.items() if k.startswith(folder + "/")} for each in (expected, found)]
            if differences(*of):
                raise Broken(f"an export has its name and is not whole: {differences(*of)}")


def is_partial(name: str) -> bool:
    """Whether a path is below a hidden, partial file or folder."""
    return any(part.startswith(".") for part in pathlib.PurePath(name).parts)


def compare(base: Base, kind: str, place: pathlib.Path) -> None:
    """Raises Broken if the results differ from those of an uninterrupted command."""
    expected, found = made(kind, base.folder / "whole"), made(kind, place)
    if kind == "evaluate":
        expected, found = ({k: v for k, v in e.items() if "evaluation" in k} for e in (expected, found))
    if kind in ("train", "evaluate"):
        expected, found = ({k: v for k, v in e.items() if "dashboards" not in k} for e in (expected, found))
    if kind == "train":
        expected = {k: v for k, v in expected.items() if "evaluation" not in k}
        for each in (expected, found):
            each.pop("config.json")
    if differs := differences(expected, found):
        raise Broken(f"{kind} does not make what it makes uninterrupted: {differs[:20]}")


def signals(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Closes the pipe of a command's output, then sends signals: it must end at once and lose nothing."""
    kind = rng.choice(["train"] * 4 + list(COMMANDS))
    prepared(base, kind, place)
    words, number = COMMANDS[kind](base, place), rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    reader, writer = os.pipe()

    is_joined = rng.random() < 0.3
    process = start(words, place / "output", writer, lambda: os.close(reader), is_joined)
    os.close(writer)
    is_dead, times = rng.random() < 0.8, rng.choice((1, 1, 2))
    process.ends_within(rng.uniform(0, base.seconds(kind)))
    if is_dead:
        os.close(reader)
        process.ends_within(rng.uniform(0, 0.3))
    for _ in range(times):
        process.send(number)
        process.ends_within(rng.uniform(0, 0.5))
    process.ends_within(30)
    if not is_dead:
        os.close(reader)
    # If stderr went into the pipe too, the refusal was not recorded.
    outcome = "refused" if is_joined and process.code == 1 else process.outcome(seconds=0)
    # -number: the signal itself ended the process, before its handler was installed.
    if process.code not in (0, 1, 128 + number, -number):
        raise Broken(f"{kind} ends with {process.code} after {number.name}: {process.tail()}")
    logged = place / "run" / "metrics.jsonl"
    if kind == "train" and outcome != "done" and times == 1 and logged.exists() and logged.stat().st_size:
        newest = max(
            (int(p.name) for p in (place / "run/checkpoints").iterdir() if p.name.isdigit()), default=0
        )
        step = json.loads(logged.read_text().splitlines()[-1])["step"]
        if newest != step:
            raise Broken(f"train ends at step {step} and has kept {newest}: {process.tail()}")
    if start(words, place / "output").outcome() == "refused" and kind not in ("export", "generate"):
        raise Broken(f"{kind} is refused afterwards: {process.tail()}")
    compare(base, kind, place)
    return f"{kind if kind == 'train' else 'others'}: {outcome}"


def damage(path: pathlib.Path, rng: random.Random) -> str:
    """Changes or replaces a file at random; returns the kind of damage."""
    content = bytearray(path.read_bytes())
    size = max(len(content), 1)
    kinds = ["flip", "flip", "flip", "cut", "cut", "empty", "double", "garbage", "zeros", "grow", "delete"]
    kinds += ["folder", "pipe", "loop", "device", "dangling", "words", "words", "line", "null"]
    kind = rng.choice(kinds)
    at = rng.randrange(size)
    match kind:
        case "flip":
            for _ in range(rng.randrange(1, 8)):
                if content:
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut":
            content = content[:at]
        case "empty":
            content = bytearray()
        case "double":
            content = content * 2
        case "garbage":
            content = bytearray(rng.randbytes(rng.randrange(1, 3000)))
        case "zeros":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        case "grow":
            content += rng.randbytes(rng.randrange(1, 200))
        case "line":  # Inserts a copy of a line, half of one or a blank one.
            lines = content.splitlines(keepends=True) or [b""]
            place = rng.randrange(len(lines))
            lines.insert(place, rng.choice([lines[place], lines[place][: len(lines[place]) // 2], b"\n"]))
            content = bytearray(b"".join(lines))
        case "words":
            found = re.findall(rb'[0-9.e+-]+|"[^"]{0,40}"|[\w]+', bytes(content[:100_000])) or [b"x"]
            other = [
                b"null",
                b"[]",
                b"{}",
                b"-1",
                b"1e999",
                b"NaN",
                b'"\\ud800\\u001b[31m"',
                b"9" * 400,
                b"true",
                b'"../../x"',
            ]
            word = rng.choice(found)
            content = content.replace(word, rng.choice([*other, rng.choice(found)]), rng.choice((1, 1, -1)))
        case "null":
            content = bytearray(
                rng.choice([b"null", b"[]", b"{}", b"1", b'"a"', b"[" * 100_000, b'{"a":' * 50_000])
            )
    if kind in ("delete", "folder", "pipe", "loop", "device", "dangling"):
        path.unlink()
    match kind:
        case "delete":
            pass
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling":
            path.symlink_to("nowhere")
        case _:
            path.write_bytes(content)
    return kind


def in_little_memory(megabytes: int) -> Callable[[], None]:
    """A function that limits a fork to `megabytes` more address space than it has."""

    def before() -> None:
        mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + megabytes * 2**20, mapped + megabytes * 2**20))

    return before


def damaged(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Damages a file: the command that reads it must refuse in one line, or produce its usual result."""
    what = rng.choice(list(DAMAGED))
    folder, words, kind = DAMAGED[what](base, rng, place)
    files = [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "tensorboard" not in p.parts and p.name != ".lock"
    ]
    # Choose the folder first, so that the many files of a checkpoint are not preferred.
    parents = sorted({p.parent for p in files})
    chosen = rng.choice([p for p in files if p.parent == rng.choice(parents)] or files)
    how = damage(chosen, rng)
    recipe = f"{what}: {how} of {chosen.relative_to(place)}"
    process = start(words, place / "output", before=in_little_memory(6000))
    try:
        outcome = process.outcome(seconds=90)
        # The contents of these two files cannot be recovered from other files.
        if outcome == "done" and kind and chosen.name not in ("config.json", "metrics.jsonl"):
            compare(base, kind, place)
    except Broken as error:
        raise Broken(f"{recipe}: {error}") from error
    if "--verbose" in sys.argv:
        print(recipe, outcome, process.tail() if outcome == "refused" else "")
    return f"{what}: {outcome}"


def _copy(base: Base, name: str, place: pathlib.Path, to: str = "run") -> pathlib.Path:
    return pathlib.Path(shutil.copytree(base.folder / name, place / to, symlinks=True))


def _run_files(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    kind = rng.choice(("train", "evaluate", "export"))
    run = _copy(base, rng.choice(("trained", "half")) if kind == "train" else "trained", place)
    return run, COMMANDS[kind](base, place), kind


def _log(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    run = _copy(base, rng.choice(("trained", "half")), place)
    for path in run.iterdir():  # Only these files will be damaged.
        if path.name in ("metrics.jsonl", "config.json", "rows"):
            (place / "small").mkdir(exist_ok=True)
            path.rename(place / "small" / path.name)
            path.symlink_to(place / "small" / path.name)
    return place / "small", COMMANDS["train"](base, place), ""


def _cache(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    rows, run = _copy(base, "whole/rows", place, "rows"), _copy(base, "trained", place)
    config_file = run / "config.json"
    config_file.write_text(
        config_file.read_text().replace(str(base.folder / "whole/rows"), str(place / "rows"))
    )
    kind = rng.choice(("train", "evaluate"))
    if kind == "train":
        shutil.rmtree(run)
    return rows, COMMANDS[kind](base, place), kind


def _evaluations(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    run = _copy(base, "whole/run", place)
    small = place / "small"
    small.mkdir()
    for path in run.glob("evaluation.*"):
        shutil.copy(path, small)
    if rng.random() < 0.5:
        return (
            small,
            ["compare", str(base.folder / "whole/run"), str(small), f"--out={place / 'compared'}"],
            "",
        )
    for path in run.glob("evaluation.*"):
        path.unlink()
        path.symlink_to(small / path.name)
    return small, ["publish", str(run), "--repo=a/b", "--license=mit", f"--out={place / 'published'}"], ""


def _parts(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    run = _copy(base, "parts", place)
    kind = rng.choice(("evaluate", "evaluate", "dashboards"))
    return (
        run / ("evaluation.parts" if kind == "evaluate" else "dashboards"),
        COMMANDS[kind](base, place),
        kind,
    )


def _saes(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    names = [p.name for p in (base.folder / "whole/exported").iterdir()]
    folder = _copy(base, f"whole/exported/{rng.choice(names)}", place, "sae")
    leaf = next(p.parent for p in sorted(folder.rglob("*")) if p.is_file())
    words = ["convert", str(leaf), "--model=tiny", "--site=layer_1_resid_post", "--format=saelens"]
    return folder, [*words, f"--out={place / 'converted'}"], ""


def _texts(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    folder = place / "text"
    folder.mkdir(parents=True)
    lines = (base.folder / "text.jsonl").read_text()
    kind = rng.choice(("jsonl", "txt", "parquet", "jsonl.gz"))
    path = folder / f"a.{kind}"
    match kind:
        case "jsonl" | "txt":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            shutil.copy(base.folder / "text.parquet", path)
    return folder, ["prepare", base.config(place, data__text=str(path), data__held_out_fraction=0.5)], ""


def _prompts(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    folder = place / "prompts"
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": f"{n} stars", "label": n % 2}) for n in range(12)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    if rng.random() < 0.3:
        _copy(base, "trained", place)
        out = f"--out={place / 'probed'}"
        return folder, ["probe", str(place / "run"), f"--labelled={folder / 'a.jsonl'}", out], ""
    words = [
        w.replace(str(base.folder / "prompts.txt"), str(folder / "a.jsonl"))
        for w in COMMANDS["generate"](base, place)
    ]
    return folder, words, ""


def _weights(base: Base, rng: random.Random, place: pathlib.Path) -> tuple:
    _copy(base, "trained", place)
    name = rng.choice(("weights", "hugging_face", "gguf"))
    folder = _copy(base, name, place, name)
    path = next(folder.glob("*.gguf"), folder)
    # The results are not compared: a change inside the weights cannot be detected.
    return folder, [*COMMANDS["evaluate"](base, place), f"--weights={path}"], ""


DAMAGED = {
    "run": _run_files, "log": _log, "cache": _cache, "evaluations": _evaluations, "parts": _parts, "saes": _saes,
    "texts": _texts, "prompts": _prompts, "weights": _weights,
}  # fmt: skip

NAMES = [
    "two words", "[v1] a", "a*b", "a?b", "$HOME", "a$b$c", "~", "~nouser", "a'b", 'a"b', "a\nb", "\tb", "-dash",
    "--flag", ".hidden", "naïve", "名前", "🙂",
    "caf\udce9", "n" * 250, "é" * 120, "...npz", "a.npz", "a=b", "a,b", "a:b",
    "a;b", "a\\b", "a|b", "a&b", "{a}", "%s %d", "{{ 7*7 }}", "<b>", "[bold]x[/bold]", "\x1b[31m", "a//b", "a/./b",
    " lead", "trail ", "a\u202eb", "step_1", "1", "checkpoints", "hf:", "#a", "!a", "`id`", "$(id)", "a\rb", "\x7f",
    "\ufeffbom",
]  # fmt: skip


def names(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Gives a path an odd name: everything must work, or be refused before the work."""
    name, role = (
        rng.choice(NAMES),
        rng.choice(("workdir", "text", "cache", "out", "weights", "sae", "prompts")),
    )
    if rng.random() < 0.3:
        name = (name + rng.choice(NAMES))[:250]
    if rng.random() < 0.2:
        name = f"{name}/{rng.choice(NAMES)}"
    place.mkdir()
    (place / "home").mkdir()
    root = str(place) + "/" if rng.random() < 0.6 else "./" if rng.random() < 0.5 else ""
    path = root + name
    real = place / name
    outcomes = []

    def before() -> None:
        os.environ["HOME"] = str(place / "home")
        os.chdir(place)

    def go(words: list[str]) -> bool:
        process = start(words, place / "output", before=before)
        try:
            outcomes.append(process.outcome())
        except Broken as error:
            raise Broken(f"{role} {path!r}: {error}") from error
        if outcomes[-1] == "refused" and "--verbose" in sys.argv:
            print(role, repr(path), process.tail())
        return outcomes[-1] == "done"

    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        match role:
            case "text":
                path, real = path + ".jsonl", real.with_name(real.name + ".jsonl")
                shutil.copy(base.folder / "text.jsonl", real)
            case "weights":
                shutil.copytree(base.folder / "weights", real)
            case "prompts":
                path, real = path + ".txt", real.with_name(real.name + ".txt")
                shutil.copy(base.folder / "prompts.txt", real)
            case "sae":
                shutil.copytree(next((base.folder / "trained/sae").iterdir()), real)
    except OSError:
        return "no such file can be made"
    if role in ("prompts", "out"):
        words = [w for w in COMMANDS["generate"](base, place) if not w.startswith("--out")]
        if role == "prompts":
            words = [w for w in words if not w.startswith("--prompts")] + [
                f"--prompts={path}",
                f"--out={place / 'r.jsonl'}",
            ]
        else:
            words.append(f"--out={path}.jsonl")
        go(words)
    changes = dict(train__tokens=128 * 8)
    if role in ("text", "weights", "cache"):
        changes[{"text": "data__text", "weights": "weights", "cache": "data__folder"}[role]] = path
    workdir = path if role == "workdir" else str(place / "run")
    if role in ("out", "sae"):
        shutil.copytree(base.folder / "trained", workdir)
    if role not in ("out", "sae", "prompts"):
        if not go(["train.py", base.config(place, **changes), f"--workdir={workdir}"]):
            started = [p for p in place.rglob("metrics.jsonl")]
            if started:
                raise Broken(f"{role} {path!r}: refused after the work: {started}")
            return f"{role}: refused"
    if role == "prompts":
        return f"{role}: {outcomes[0]}"
    subject = path if role == "sae" else workdir
    quick = ["--rows=2", "--rows_per_batch=2"]
    of_sae = (
        ["--model=tiny", f"--weights={base.folder / 'weights'}", f"--text={base.folder / 'text.jsonl'}"]
        if role == "sae"
        else []
    )
    out = (
        (lambda kind: f"--out={path}_{kind}")
        if role == "out"
        else (lambda kind: f"--out={place / ('out_' + kind)}")
    )
    fine = [
        go(["evaluate.py", subject, *quick, *of_sae, *([out("evaluated")] if role == "out" else [])]),
        go(["dashboards", subject, *quick, *of_sae, *([out("dashboards")] if role == "out" else [])]),
    ]
    if role != "sae":
        fine.append(go(["export", subject, "--format=all", out("exported")]))
    of = subject if role == "sae" else next((base.folder / "trained/sae").iterdir())
    fine.append(go(["convert", str(of), "--format=gemma_scope", out("converted")]))
    if all(fine):
        return f"{role}: done"
    is_flag = not root and name.startswith("-")  # argparse takes it for a flag.
    if role == "workdir" and not is_flag:
        raise Broken(f"{role} {path!r}: trained, then {outcomes[1:]}")
    return f"{role}: refused"


def without_rights() -> None:
    """Drops root's privileges from this process, so that it obeys the permission bits of its own files."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def rights(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Makes folders read-only or files unreadable: a command must refuse only if it needs the permission."""
    _copy(base, "trained", place)
    rows, text = _copy(base, "whole/rows", place, "rows"), place / "text.jsonl"
    shutil.copy(base.folder / "text.jsonl", text)
    weights, locked = _copy(base, "weights", place, "weights"), place / "locked"
    locked.mkdir()
    config_file = place / "run" / "config.json"
    config_file.write_text(
        config_file.read_text().replace(str(base.folder / "whole/rows"), str(place / "rows"))
    )
    out = f"--out={locked / 'out'}"
    quick = ["--rows=2", "--rows_per_batch=2"]
    run = str(place / "run")
    small = dict(train__tokens=128 * 8)

    def a_file(folder: pathlib.Path) -> pathlib.Path:
        return rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"])

    def read_only(folder: pathlib.Path) -> list[pathlib.Path]:
        return [folder, *(p for p in folder.rglob("*") if p.is_dir())]

    unreadable, row_file, weight_file = a_file(place / "run"), a_file(rows), a_file(weights)
    an_sae = next((place / "run/sae").iterdir())
    evaluated = ["evaluate.py", run, *quick]
    elsewhere = f"--out={place / 'other'}"
    dashboards, export = ["dashboards", run, *quick], ["export", run]
    new, convert = ["train.py", base.config(place, **small)], ["convert", str(an_sae), "--format=gemma_scope"]
    on_text = base.config(
        place / "on_text", data__text=str(text), data__folder=str(place / "on_text" / "rows")
    )
    generate = [word for word in COMMANDS["generate"](base, place) if not word.startswith("--out")]
    whole = [str(base.folder / name) for name in ("whole/run", "whole/evaluated")]
    runs = read_only(place / "run")
    # The paths, their mode, the command, and whether it must succeed (None: either way).
    cases = {
        "cache, evaluate": (read_only(rows), 0o555, evaluated, True),
        "cache, train": (read_only(rows), 0o555, [*new, f"--workdir={place / 'new'}"], True),
        "cache, other": (
            read_only(rows),
            0o555,
            [*evaluated, f"--text={base.folder / 'prompts.txt'}", elsewhere],
            False,
        ),
        "cache, unreadable": ([row_file], 0o000, evaluated, None),
        "run, evaluate": (runs, 0o555, evaluated, False),
        "run, evaluate elsewhere": (runs, 0o555, [*evaluated, elsewhere], True),
        "run, export": (runs, 0o555, [*export, elsewhere], True),
        "run, train": (runs, 0o555, COMMANDS["train"](base, place), False),
        "run, dashboards": (runs, 0o555, dashboards, False),
        "run, unreadable, evaluate": ([unreadable], 0o000, evaluated, None),
        "run, unreadable, train": ([unreadable], 0o000, COMMANDS["train"](base, place), None),
        "run, unreadable, export": ([unreadable], 0o000, [*export, elsewhere], None),
        "out, evaluate": ([locked], 0o555, [*evaluated, out], False),
        "out, export": ([locked], 0o555, [*export, out], False),
        "out, dashboards": ([locked], 0o555, [*dashboards, out], False),
        "out, generate": ([locked], 0o555, [*generate, out], False),
        "out, publish": ([locked], 0o555, ["publish", whole[0], "--repo=a/b", "--license=mit", out], False),
        "out, compare": ([locked], 0o555, ["compare", *whole, out], False),
        "out, convert": ([locked], 0o555, [*convert, out], False),
        "out, train": ([locked], 0o555, [*new, f"--workdir={locked / 'run'}"], False),
        "text": ([text], 0o000, ["train.py", on_text, f"--workdir={place / 'new'}"], False),
        "weights": ([weight_file], 0o000, [*evaluated, f"--weights={weights}"], None),
        "weights folder": ([weights], 0o000, [*evaluated, f"--weights={weights}"], False),
        "sae": ([a_file(an_sae)], 0o000, [*convert, elsewhere], None),
        "prompts": ([text], 0o000, [*COMMANDS["generate"](base, place), f"--prompts={text}"], False),
    }
    name = rng.choice(list(cases))
    paths, mode, words, must_work = cases[name]
    for path in paths:
        path.chmod(mode)
    try:
        process = start(words, place / "output", before=without_rights)
        outcome = process.outcome()
    except Broken as error:
        raise Broken(f"{name}: {error}") from error
    finally:
        for path in paths:
            path.chmod(0o755)
    if must_work is not None and must_work != (outcome == "done"):
        raise Broken(f"{name}: {outcome}{process.tail()}")
    said = process.err.read_text(errors="replace")
    if outcome == "refused" and not any(
        str(p) in said or p.name in said for p in (place, *paths, *paths[0].parents)
    ):
        raise Broken(f"{name}: what was refused is not named: {said}")
    if outcome == "refused" and mode == 0o000 and (place / "new" / "metrics.jsonl").exists():
        raise Broken(f"{name}: refused after the work")
    if "--verbose" in sys.argv:
        print(name, [str(p) for p in paths][:1], outcome, said if outcome == "refused" else "")
    return f"{name.split(',')[0]}: {outcome}"


NONSENSE = [
    float("nan"), float("inf"), -float("inf"), -1, -1.0, 0, 0.0, -0.5, 1.5, 2**31, 2**31 - 1, 2**32, 2**62, 2**64,
    10**30, 1e-300, 1e30, 1e300, "", "abc", "\x1b[31m", "\ud800", None, True, [], {}, [-1], [2**62], [float("nan")],
    [0.0], [1, 1], ["abc"],
]  # fmt: skip


def numbers(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Sets a config field or flag to nonsense: it must be refused in one line, or the results must be sane."""
    _copy(base, "whole/rows", place, "rows")
    plain = config.flatten(tiny.run_config(base.folder))
    field, value = rng.choice(list(plain)), rng.choice(NONSENSE)
    if isinstance(plain[field], list) and not isinstance(value, list) and rng.random() < 0.7:
        value = [value]
    if type(plain[field]) is float and isinstance(value, int):
        value = float(value)
    path = place / "config.py"
    base.config(place, train__tokens=128 * 40)
    content = (
        path.read_text()
        .replace("json.loads", "changed(json.loads")
        .replace("))\n", f"), {field!r}, {json.dumps(value)!r}))\n")
    )
    path.write_text(
        content
        + "\n\ndef changed(values, field, value):\n    *parents, last = field.split('.')\n    at = values\n"
        "    for name in parents:\n        at = at[name]\n    at[last] = json.loads(value)\n    return values\n"
    )
    words = ["train.py", f"--config={path}", f"--workdir={place / 'run'}"]
    what = f"{field} = {value!r}"
    if rng.random() < 0.3:
        command, flag = rng.choice(FLAGS)
        value = rng.choice([v for v in NONSENSE if isinstance(v, (int, float))])
        what = f"{command} {flag}={value}"
        _copy(base, "trained", place)
        words = [*COMMANDS[command](base, place), f"{flag}={value}"]
    process = start(words, place / "output", before=in_little_memory(8000))
    try:
        if not process.ends_within(40):  # A run over very many tokens.
            process.send(signal.SIGINT)
            outcome = process.outcome(30)
            if not list(place.glob("run/metrics.jsonl")):
                raise Broken(f"works for 40 seconds on nothing: {process.tail()}")
        else:
            outcome = process.outcome()
        if words[0] == "train.py":
            check_sane(place / "run" / "metrics.jsonl", process)
    except Broken as error:
        raise Broken(f"{what}: {error}") from error
    if "--verbose" in sys.argv:
        print(what, outcome, process.tail() if outcome != "done" else "")
    return outcome


def check_sane(log: pathlib.Path, process: Process) -> None:
    """Raises Broken if a run logged impossible numbers, or did not warn of a very bad SAE."""
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        for of_sae in entry["sae"].values():
            bad = {k: v for k, v in of_sae.items() if isinstance(v, float) and not abs(v) < 1e6}
            fvu = of_sae.get("fvu") or 0
            if bad or fvu < -0.01 or (fvu > 1e3 and "further from" not in process.tail()):
                raise Broken(f"step {entry['step']} has {bad} and an FVU of {fvu}")


FLAGS = [
    ("evaluate", "--rows"), ("evaluate", "--rows_per_batch"), ("dashboards", "--rows"), ("dashboards", "--top"),
    ("dashboards", "--rows_per_batch"), ("generate", "--num_tokens"), ("generate", "--temperature"),
    ("generate", "--seed"), ("generate", "--rows_per_batch"), ("prepare", "--workers"),
]  # fmt: skip


def twins(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Runs a command twice at once: both succeed, or one waits or is refused, and the result is right."""
    kind = rng.choice(["evaluate", "evaluate", *COMMANDS])
    prepared(base, kind, place)
    words = COMMANDS[kind](base, place)
    first = start(words, place / "output")
    first.ends_within(rng.choice([0, 0.05, rng.uniform(0, 1) * base.seconds(kind)]))
    second = start(words, place / "output")
    found = sorted([first.outcome(), second.outcome()])
    if "done" not in found:
        raise Broken(f"two of {kind}: {found}: {first.tail()} {second.tail()}")
    compare(base, kind, place)
    if left := leftovers(place):
        raise Broken(f"{kind} leaves {left}")
    return f"{kind}: {' and '.join(found)}"


def writers(base: Base, rng: random.Random, place: pathlib.Path) -> str:
    """Several processes write one file repeatedly and some are killed: it is always whole, and no writer fails."""
    place.mkdir()
    path = place / "a.txt"

    def write(letter: str) -> None:
        for _ in range(100):
            with files.replacing_file(path) as partial, partial.open("w") as file:
                for _ in range(50):
                    file.write(letter * 1000)

    pids = [forked(lambda letter=letter: write(letter)) for letter in "abcd"]
    time.sleep(rng.uniform(0, 0.3))
    doomed = pids[: rng.randrange(3)]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(code and pid not in doomed for pid, code in zip(pids, codes, strict=True)):
        raise Broken(f"writers of one file end with {codes}")
    content = path.read_text()
    if len(content) != 50_000 or len(set(content)) != 1:
        raise Broken(f"a file is not whole: {len(content)} characters, {set(content)}")
    pid = forked(lambda: write("e"))
    if os.waitpid(pid, 0)[1] or leftovers(place):
        raise Broken(f"after it there are {leftovers(place)}")
    return f"{len(doomed)} of 4 killed"


ATTACKS: dict[str, Callable[[Base, random.Random, pathlib.Path], str]] = {
    "kills": kills,
    "signals": signals,
    "damaged": damaged,
    "names": names,
    "rights": rights,
    "numbers": numbers,
    "twins": twins,
    "writers": writers,
}


def main() -> int:
    """Runs the chosen attacks and prints their outcomes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=[*ATTACKS, "all"])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--count", type=int, default=10, help="attempts of each kind")
    parser.add_argument("--only", type=int, help="this attempt alone")
    parser.add_argument("--verbose", action="store_true", help="tell of each attempt what was done and said")
    parser.add_argument("--base", type=pathlib.Path, help="a folder of an earlier call, to save its making")
    args = parser.parse_args()
    imports()
    tiny.register()
    broken = 0
    with tempfile.TemporaryDirectory(prefix="attacks") as folder:
        place = args.base or pathlib.Path(folder) / "base"
        keep_compiled(place / "compiled")
        place.mkdir(parents=True, exist_ok=True)
        with (place / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            base = lay_out(place)
        for name in ATTACKS if "all" in args.names else args.names:
            found = collections.Counter()
            for number in range(args.count) if args.only is None else [args.only]:
                place = pathlib.Path(folder) / f"{name}_{number}"
                rng = random.Random(f"{args.seed} {name} {number}")
                started = time.monotonic()
                try:
                    outcome = ATTACKS[name](base, rng, place)
                except Exception as error:  # Broken, or an unexpected error of the attack itself.
                    outcome = "BROKEN"
                    error = error if isinstance(error, Broken) else traceback.format_exc()
                    recipe = f"python tests/attacks.py {name} --seed={args.seed} --only={number}"
                    print(f"{recipe}\n  {error}\n", flush=True)
                found[outcome] += 1
                print(f"{name} {number}: {outcome}, {time.monotonic() - started:.1f} s", flush=True)
                shutil.rmtree(place, ignore_errors=True)
            broken += found["BROKEN"]
            figures = "; ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
            print(f"{name}, seed {args.seed}: {sum(found.values())} attempts: {figures}", flush=True)
    return int(broken > 0)


def imports() -> None:
    """Imports the modules that commands import late, so that forks need not."""
    import tensorflow_datasets  # noqa: F401

    from gemma_scope_jax.analysis.dashboards import build  # noqa: F401
    from gemma_scope_jax.runtime import distributed  # noqa: F401


def keep_compiled(folder: pathlib.Path) -> None:
    """Turns on JAX's compilation cache, so that each program is compiled once for all forks."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    sys.exit(main())
