"""Signals to the command line, also when its output fails, and to a program that calls the library."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from gemma_scope_jax import config
from gemma_scope_jax.analysis import session
from gemma_scope_jax.analysis.dashboards import build
from gemma_scope_jax.cli import contrast as contrast_cli
from gemma_scope_jax.cli import detect as detect_cli
from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.cli import generate
from gemma_scope_jax.cli import probe as probe_cli
from gemma_scope_jax.evaluation import opening
from gemma_scope_jax.models import placement
from gemma_scope_jax.runtime import signals

# A program that keeps training for some seconds after a signal. It does not import JAX, so it starts at once.
TRAINS = """
import signal, sys, time
from gemma_scope_jax.cli import common
from gemma_scope_jax.runtime import signals

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Whatever the tests were started by.

def main():
    with signals.saving() as request:
        print("Training.", flush=True)
        while request.number is None:
            print("a step", flush=True)
            time.sleep(0.01)
        time.sleep(float(sys.argv[1]))
    raise signals.Interrupted(request.number, "Saved step 7.")

common.run(main)
"""
READS = """
import time
from gemma_scope_jax.cli import common
from gemma_scope_jax.runtime import signals

def main():
    print("Reading.", flush=True)
    time.sleep(60)

common.run(main, "nothing was written")
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


def start(program, *arguments, stderr=subprocess.PIPE, under=()):
    """Starts a program and returns it after its first line of output."""
    command = [*under, sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT)
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handled_after_the_reader_of_the_output_has_gone(number):
    """Ctrl-C in `train | tee log` ends tee too, and a closed terminal closes both streams."""
    with start(TRAINS, 0) as process:
        process.stdout.close()
        process.send_signal(number)
        told = [line for line in process.stderr.read().splitlines() if line]
    assert process.returncode == 128 + number
    saving = f"{number.name}: saving a checkpoint, then exiting. A second signal exits at once."
    assert told == [saving, "Saved step 7."]
    with start(TRAINS, 0, stderr=subprocess.STDOUT) as process:
        process.stdout.close()
        process.send_signal(number)
    assert process.returncode == 128 + number


def test_signals_at_once_count_as_one_and_a_later_one_exits_at_once():
    with start(TRAINS, 0.5) as process:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.1)
        assert "Saved step 7." in process.communicate()[1]
    assert process.returncode == 143
    with start(TRAINS, 30) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        assert "SIGINT: exiting at once; this is the second signal." in process.communicate(timeout=60)[1]
    assert process.returncode == 130


def test_without_anything_to_save_a_signal_ends_a_command_at_once_with_one_line():
    with start(READS) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == "\nSIGTERM: exiting at once; nothing was written.\n"
    assert process.returncode == 143


def test_a_hangup_stays_ignored_under_nohup():
    with start(READS, under=("nohup",)) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert "SIGHUP" not in process.communicate(timeout=60)[1]
    assert process.returncode == 143


SPEAKS = """
import contextlib, os, sys
from gemma_scope_jax.cli import common

def main():
    with open(sys.argv[1], "wb", buffering=0) as file:
        print("λ", flush=True)
        print("more", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.write(2, b"of a library")
        file.write(b"kept")

common.run(main)
"""


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", ">&- 2>&-", "| true", "2>&1 | true"])
def test_output_that_cannot_be_written_does_not_stop_a_command(tmp_path, redirection):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PROGRAM": SPEAKS, "OUT": str(tmp_path / "out")}
    script = f'set -o pipefail; {{ sleep 0.2; {sys.executable} -c "$PROGRAM" "$OUT"; }} {redirection}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done
    assert (tmp_path / "out").read_bytes() == b"kept"
    assert "Exception" not in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def untouched():
    """Checks that signal handlers, the wakeup pipe and threads are the same after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers], threading.active_count()
    yield
    assert ([signal.getsignal(number) for number in numbers], threading.active_count()) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_first_interrupt_of_a_library_call_is_deferred_and_the_second_raised(untouched):
    with signals.saving() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_no_signal_is_deferred_on_another_thread(untouched):
    found = []

    def work():
        with signals.saving() as request:
            found.append(request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signals.Request()]


@pytest.mark.parametrize(
    "name", ["evaluate", "detect", "probe", "generate", "audit", "dashboards", "explore"]
)
def test_library_functions_raise_keyboard_interrupt(untouched, tmp_path, monkeypatch, name):
    """So Ctrl-C in a notebook ends the cell but not the kernel."""

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(opening, "open_path", interrupted)
    monkeypatch.setattr(placement, "load_gemma", interrupted)
    for file, word in (("a", "first"), ("b", "second")):
        (tmp_path / f"{file}.txt").write_text("\n".join(f"{word} {i}" for i in range(8)))
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("\n".join(f'{{"text": "{i}", "label": {i % 2}}}' for i in range(40)))
    of_model = config.from_dict({"model": "tiny"})
    call = {
        "evaluate": lambda: evaluate_cli.evaluate_path(tmp_path),
        "detect": lambda: detect_cli.detect_path(tmp_path),
        "probe": lambda: probe_cli.probe_path(tmp_path, labelled),
        "generate": lambda: generate.write_rollouts(
            of_model, tmp_path / "a.txt", tmp_path / "out.jsonl", 3, 0.0, 0, False, 2
        ),
        "audit": lambda: contrast_cli.audit(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt"),
        "dashboards": lambda: build.build(tmp_path),
        "explore": lambda: session.open_scope(tmp_path),
    }[name]
    with pytest.raises(KeyboardInterrupt):
        call()
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".*"))
