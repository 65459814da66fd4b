"""Ctrl-C, SIGTERM and SIGHUP: the command line answers them at once, and a run saves before it stops.

Python runs a signal's handler only between bytecodes, so not while XLA compiles or a step runs. But the C-level
handler writes the signal's number to a pipe at once, and a thread of the command line reads it there.

A program that calls the library keeps its own handlers. There an interrupt is Python's KeyboardInterrupt, and
`saving` only delays it until the run is saved. With several processes JAX handles SIGTERM, and Ctrl-C ends them
without saving.
"""

import contextlib
import dataclasses
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

_ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A second signal this soon counts as the first: `timeout`, systemd and a closing terminal send two and mean one.
_SAME_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop by the signal `number` and has saved its state."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclasses.dataclass
class Request:
    """A request to stop a run: the number of the signal, or None before any signal."""

    number: int | None = None


class _CommandLine:
    """The thread that answers signals. It decides first and prints second; printing can neither fail nor block."""

    def __init__(self) -> None:
        self.why = ""  # What is lost or kept if the process exits at once.
        self.request: Request | None = None  # That of the run which would save first.
        self.passes_on_hangups = False
        self.deciding = threading.Lock()
        self._asked_at = 0.0
        # Under nohup, which ignores SIGHUP, it stays ignored.
        self._signals = [s for s in _ANSWERED if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.take_signals()
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def take_signals(self) -> None:
        for number in self._signals:
            signal.signal(number, lambda *_: None)

    def _listen(self, reader: int) -> None:
        while byte := os.read(reader, 1):
            if byte[0] in self._signals:
                self._answer(signal.Signals(byte[0]))

    def _answer(self, number: signal.Signals) -> None:
        if self.passes_on_hangups and number == signal.SIGHUP:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        now = time.monotonic()
        with self.deciding:
            request = self.request
            is_first = request is not None and request.number is None
            if is_first:
                request.number, self._asked_at = number, now
        if is_first:
            _say(f"{number.name}: saving a checkpoint, then exiting. A second signal exits at once.")
        elif request is None or now - self._asked_at > _SAME_SECONDS:
            why = self.why if request is None else "this is the second signal"
            try:
                _say(f"{number.name}: exiting at once{why and f'; {why}'}.")
                _end_children()  # After printing, because the main thread may print something when they end.
            finally:
                os._exit(128 + number)


def _end_children() -> None:
    """Ends the worker processes, which would end by themselves but may be busy importing."""
    if multiprocessing := sys.modules.get("multiprocessing"):  # Otherwise there are none.
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()


_command_line: _CommandLine | None = None


def _say(text: str) -> None:
    """Writes to standard error directly; in Python another thread may hold the stream and wait for its reader."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 1)[1]:
            os.write(2, f"\n{text}\n".encode())


def answer(why: str = "") -> None:
    """Makes signals end this process at once, with a message of one line. The command line calls it once.

    Args:
      why: see `leaving`.
    """
    global _command_line
    _command_line = _command_line or _CommandLine()
    _command_line.why = why


def answer_again() -> None:
    """Takes signals back from a library that took them; does nothing if the command line does not answer signals."""
    if _command_line:
        _command_line.take_signals()


def pass_on_hangups() -> None:
    """Leaves SIGTERM to JAX, whose preemption service makes all hosts save, and turns SIGHUP into SIGTERM."""
    if _command_line:
        _command_line.passes_on_hangups = True


def leaving(why: str) -> None:
    """Sets the text to print when a signal ends the process at once: what is lost, or how to resume."""
    if _command_line:
        _command_line.why = why


@contextlib.contextmanager
def saving() -> Iterator[Request]:
    """Within it a signal is only recorded, so that the caller can save and then raise `Interrupted`.

    A second signal ends the process.

    In a program that calls the library, it delays Ctrl-C in the main thread, where Python delivers it.
    """
    request = Request()
    previous = None
    if _command_line:
        _command_line.request = request
    elif threading.current_thread() is threading.main_thread():
        previous = signal.getsignal(signal.SIGINT)

    def remember(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, previous)
        request.number = number

    if callable(previous):
        signal.signal(signal.SIGINT, remember)
    try:
        yield request
    finally:
        if _command_line:
            with _command_line.deciding:
                _command_line.request = None
        elif callable(previous):
            signal.signal(signal.SIGINT, previous)
