"""SIGTERM and Ctrl-C: answered at once, with a save where there is something to save.

Python runs a signal's handler only between bytecodes, so not while XLA compiles or a step runs. The C-level
handler does write the signal's number to a pipe at once; a thread reads it there.

With more than one process SIGTERM is JAX's, whose preemption service has all hosts stop after the same step, and
Ctrl-C ends the process at once, and the others when they miss it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from gemma_scope_jax import hosts


class Interrupts:
    """Between `allow_saving` and `forbid_saving` a signal is remembered in `received`; else it ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._saving_allowed = False
        self._why_not = "nothing has been trained yet"
        self._is_alone = jax.process_count() == 1
        signals = (signal.SIGTERM, signal.SIGINT) if self._is_alone else ()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._writer = writer
        self._previous = {s: signal.signal(s, lambda *_: None) for s in signals}
        self._previous_fd = signal.set_wakeup_fd(writer)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def close(self) -> None:
        """Gives signals back to whom they belonged."""
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # Ends the thread.

    def allow_saving(self) -> None:
        """From here on the caller asks `should_stop` after each step."""
        self._saving_allowed = True

    def should_stop(self, step: int) -> bool:
        """Whether this step is to be saved and be the last for now."""
        if not self._is_alone and self.received is None and hosts.is_preempted(step):
            print(f"\nSIGTERM: all hosts save step {step}, then leave.", flush=True)
            self.received = signal.SIGTERM
        return self.received is not None

    def forbid_saving(self, why: str) -> None:
        """From here on there is nothing newer than the last checkpoint, for the reason given."""
        self._saving_allowed, self._why_not = False, why

    def _listen(self, reader: int) -> None:
        while byte := os.read(reader, 1):
            number = byte[0]
            if number not in self._previous:
                continue
            name = signal.Signals(number).name
            if self._saving_allowed and self.received is None:
                print(f"\n{name}: saving a checkpoint, then leaving. Once more leaves at once.", flush=True)
                self.received = number
            else:
                why = "asked twice" if self.received else self._why_not
                print(f"\n{name}: leaving at once; {why}.", flush=True)
                os._exit(128 + number)
        os.close(reader)


@contextlib.contextmanager
def ending_at_once(why: str) -> Iterator[None]:
    """Within it a signal ends the process at once; `why` says that nothing is saved."""
    interrupts = Interrupts()
    interrupts.forbid_saving(why)
    try:
        yield
    finally:
        interrupts.close()
