"""Several processes train one run: the numbers are the same, one process prints, all end together and resume."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny

from gemma_scope_jax import config
from gemma_scope_jax.cli import evaluate as evaluate_cli
from gemma_scope_jax.runtime import distributed
from gemma_scope_jax.training import loop, metrics_log, runs

ROOT = pathlib.Path(__file__).parents[2]
# Three members padded to four, a mesh of 2 × 4, and Gemma split over all devices.
CHANGES = dict(
    banks__main__sparsity_coefficients=(1e-3, 1e-2, 1e-1),
    mesh__data=2,
    mesh__latent=4,
    mesh__gemma="split",
    hosts__heartbeat_timeout_seconds=10,
    train__tokens=128 * 46,
    log__checkpoint_every=10,
)


class Hosts:
    """Processes on this machine with eight devices in total, set up by Slurm's variables or JAX's three."""

    def __init__(self, given: dict, workdir: pathlib.Path, count: int, by_slurm: bool = False) -> None:
        """Starts the processes.

        Args:
          given: the argument of tests/tiny.py.
          workdir: the output of each process goes to a file beside this folder.
          count: the number of processes.
          by_slurm: whether to set Slurm's variables instead of JAX's.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.workdir = workdir
        self.outputs = [workdir.with_suffix(f".{i}.out") for i in range(count)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            told = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
            slurm = {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": str(i),
                "JAX_COORDINATOR_PORT": str(port),
            }
            environment = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(8 // count),
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                **(slurm if by_slurm else told),
            }
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / "tests" / "tiny.py"), json.dumps(given)],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | environment,
                    )
                )

    def text(self) -> str:
        return "\n".join(f"--- {i}\n{output.read_text()}" for i, output in enumerate(self.outputs))

    def wait(self, timeout: float = 300) -> list[int]:
        """Waits for the processes and returns their exit codes; kills those that take too long."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(timeout=max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def wait_until_logged(self, count: int) -> None:
        deadline = time.monotonic() + 240
        path = self.workdir / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < count:
            assert all(p.poll() is None for p in self.processes), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The workdir of a run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    loop.train(tiny.run_config(inputs, **CHANGES), workdir)
    return workdir


@pytest.fixture(scope="module")
def four(inputs, tmp_path_factory):
    """The workdir of an uninterrupted run of four processes."""
    return finish(tiny.run_config(inputs, **CHANGES), tmp_path_factory.mktemp("runs") / "four", 4)


def to_train(run_config, workdir):
    return {"config": config.to_dict(run_config), "workdir": str(workdir)}


def finish(run_config, workdir, count, by_slurm=False):
    group = Hosts(to_train(run_config, workdir), workdir, count, by_slurm)
    assert group.wait() == [0] * count, group.text()
    assert "Exported" in group.outputs[0].read_text()
    for output in group.outputs[1:]:
        assert not re.search("Compiling|Gemma:|Warning:|step/s|Exported", output.read_text()), group.text()
    return workdir


def losses(workdir):
    entries = metrics_log.read_metrics(workdir)
    assert [entry["step"] for entry in entries] == list(range(1, 51))
    return np.array([[v["loss"] for v in entry["sae"].values()] for entry in entries if entry["sae"]])


def state(workdir):
    return jax.device_get(runs.open_run(workdir, what="banks")[1].banks["main"])


def assert_same_run(workdir, expected):
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state(workdir), state(expected)
    )
    exported, same = (
        sorted(p.relative_to(folder) for p in folder.rglob("sae/**/*.safetensors"))
        for folder in (workdir, expected)
    )
    assert exported == same and len(exported) == 6


def test_two_processes_train_the_same_as_one(inputs, alone, tmp_path):
    assert_same_run(finish(tiny.run_config(inputs, **CHANGES), tmp_path / "two", 2, by_slurm=True), alone)


def test_two_processes_evaluate_the_same_as_one(alone, tmp_path):
    """Latents, rows and Gemma are split over the devices of both processes; only one writes and prints."""
    out = tmp_path / "by_two"
    group = Hosts({"evaluate": {"path": str(alone), "rows": 10, "out": str(out)}}, out, 2)
    evaluate_cli.evaluate_path(alone, rows=10, out=tmp_path / "by_one")  # At the same time, in this process.
    assert group.wait() == [0, 0], group.text()
    assert not re.search("Evaluating|Wrote", group.outputs[1].read_text())
    by_one, by_two = (
        json.loads((tmp_path / by / "evaluation.json").read_text())["sae"] for by in ("by_one", "by_two")
    )
    assert len(by_one) == 3
    for name, numbers in by_one.items():
        assert by_two[name].pop("verdict")["faults"] == numbers.pop("verdict")["faults"]
        for number, value in numbers.items():
            if value is not None:
                want = by_two[name][number]
                np.testing.assert_allclose(want, value, rtol=1e-4, atol=1e-5, err_msg=number)


@pytest.mark.soak
def test_four_processes_train_the_same_as_one(alone, four):
    assert_same_run(four, alone)


@pytest.mark.soak
def test_four_processes_end_together_after_a_signal_or_kill_and_resume_bit_for_bit(inputs, four, tmp_path):
    c = tiny.run_config(inputs, **CHANGES)
    group = Hosts(to_train(c, tmp_path / "run"), tmp_path / "run", 4)
    group.wait_until_logged(12)
    group.processes[2].send_signal(signal.SIGTERM)
    assert group.wait() == [143] * 4, group.text()
    last = len((group.workdir / "metrics.jsonl").read_text().splitlines())
    assert f"SIGTERM: all hosts save step {last}, then exit." in group.outputs[0].read_text()
    assert (group.workdir / "checkpoints" / str(last)).exists()

    group = Hosts(to_train(c, tmp_path / "run"), tmp_path / "run", 4)
    group.wait_until_logged(last + 12)
    group.processes[1].kill()
    killed = time.monotonic()
    codes = group.wait()
    assert time.monotonic() - killed < 10 + 15, (
        group.text()
    )  # The heartbeat's timeout, and some time to react.
    assert all(codes), codes
    # JAX names the dead process.
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\s+1\s", group.text())

    finish(c, tmp_path / "run", 4)
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path / "run"), state(four))
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(four))


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
TOLD = {"JAX_COORDINATOR_ADDRESS": "node3:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, distributed.ALONE),
        (TOLD, distributed.Place("node3:99", 2, 1, None)),
        (SLURM, distributed.Place(f"node3:{61440 + 7}", 2, 1, [0])),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, distributed.ALONE),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, distributed.ALONE),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, distributed.Place(f"node3:{61440 + 7}", 2, 1, [])),
    ],
)
def test_the_process_is_identified_from_the_environment(environment, place, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.place_in(environment) == place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"JAX_PROCESS_ID": None},
            "only JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is set; set all three, or none",
        ),
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID is 'one', expected a whole number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2; with JAX_NUM_PROCESSES=2 it must be from 0 to 1"),
        ({"JAX_NUM_PROCESSES": "-2"}, "JAX_NUM_PROCESSES is '-2', expected a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "node3"}, "JAX_COORDINATOR_ADDRESS is 'node3'; it must be HOST:PORT"),
        (dict.fromkeys(TOLD) | SLURM | {"SLURM_NTASKS": "two"}, "this cluster does not identify the other"),
    ],
)
def test_invalid_environment_variables_are_refused_by_name(changes, message, monkeypatch):
    environment = {name: value for name, value in (TOLD | changes).items() if value is not None}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught:
        distributed.initialize()
    assert "\n" not in str(caught.value)


EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        ({"SLURM_LOCALID": "1"}, None),  # JAX then chooses the GPU with that index.
        (EIGHT | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}, []),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "4", "SLURM_NTASKS": "4"}, []),
        (
            EIGHT | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "1"},
            [4, 5, 6, 7],
        ),
        ({"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, [3]),
        (EIGHT | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_PER_TASK": "4"}, []),
        (
            EIGHT | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_TRES_PER_TASK": "cpu:4"},
            [0, 1],
        ),
        ({"CUDA_VISIBLE_DEVICES": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}, []),
        (EIGHT | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        (
            {"JAX_LOCAL_DEVICE_IDS": "2,3", "SLURM_STEP_TASKS_PER_NODE": "1"},
            None,
        ),  # JAX reads the variable itself.
    ],
)
def test_a_task_uses_its_share_of_a_hosts_gpus(environment, gpus):
    assert distributed.gpus_of(environment) == gpus


@pytest.mark.parametrize(
    ("index", "address", "seen"),
    [
        (0, "localhost:1", "for process 1, 2 to connect"),
        (1, "localhost:1", "it does not answer: Connection refused"),
        (1, "nowhere.invalid:1", "the host name nowhere.invalid is unknown here"),
    ],
)
def test_waiting_for_other_processes_is_reported_and_times_out_in_one_line(
    monkeypatch, capsys, index, address, seen
):
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": str(index)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_SAY_AFTER", 0.1)
    monkeypatch.setattr(distributed, "_connect", lambda *_: threading.Event().wait(5))
    with pytest.raises(ValueError, match=r"^waited 1 s \(hosts\.join_timeout_seconds\) as proc") as caught:
        distributed.initialize(join_timeout_seconds=1)
    assert seen in str(caught.value) and "\n" not in str(caught.value)
    first = capsys.readouterr().out.splitlines()[0]
    assert f"Waiting as process {index} of 3 (from 0)" in first and address in first and seen in first


def test_a_port_in_use_is_reported_before_waiting(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        }
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ValueError, match=rf"cannot listen on port {port} for the other processes: Address al"
        ):
            distributed.initialize()


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, None])
def test_a_waiting_process_handles_signals_and_times_out_in_one_line(inputs, tmp_path, number):
    c = tiny.run_config(inputs, **CHANGES | {"hosts__join_timeout_seconds": 10})
    group = Hosts(to_train(c, tmp_path / "run"), tmp_path / "run", 2, by_slurm=True)
    group.processes[1].kill()
    deadline = time.monotonic() + 120
    while "Waiting as process 0 of 2" not in group.outputs[0].read_text():
        assert time.monotonic() < deadline and group.processes[0].poll() is None, group.text()
        time.sleep(0.1)
    if number:
        group.processes[0].send_signal(number)
    assert group.wait(20)[0] == (128 + number if number else 1), group.text()
    told = group.outputs[0].read_text().split("so far.")[-1]
    assert len(told.strip().splitlines()) == 1, group.text()
