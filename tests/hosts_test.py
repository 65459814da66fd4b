"""Several processes are one run: the same numbers, one voice, one end for all, and the way back from it."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from gemma_scope_jax import config, hosts, log, report, runs, training

ROOT = pathlib.Path(__file__).parent.parent
# Three members, padded to four; Gemma split over all devices; a mesh of 2 × 4.
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
    """Processes of eight devices together, on this machine, as Slurm starts them or told by three variables."""

    def __init__(self, given: dict, workdir: pathlib.Path, count: int, by_slurm: bool = False) -> None:
        """Starts them; `given` is what tests/tiny.py takes, and beside the workdir they leave what they say."""
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
        """The exit code of each."""
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
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    training.train(tiny.run_config(inputs, **CHANGES), workdir)
    return workdir


@pytest.fixture(scope="module")
def four(inputs, tmp_path_factory):
    """The run of four processes, never stopped."""
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
    entries = log.read_metrics(workdir)
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


def test_two_processes_train_what_one_trains(inputs, alone, tmp_path):
    assert_same_run(finish(tiny.run_config(inputs, **CHANGES), tmp_path / "two", 2, by_slurm=True), alone)


def test_two_processes_evaluate_what_one_evaluates(alone, tmp_path):
    """With latents, rows and Gemma over the devices of both, and one of them alone writing and speaking."""
    out = tmp_path / "by_two"
    group = Hosts({"evaluate": {"path": str(alone), "rows": 10, "out": str(out)}}, out, 2)
    report.evaluate_path(alone, rows=10, out=tmp_path / "by_one")  # Meanwhile, here.
    assert group.wait() == [0, 0], group.text()
    assert not re.search("Evaluating|Wrote", group.outputs[1].read_text())
    by_one, by_two = (
        json.loads((tmp_path / by / "evaluation.json").read_text())["sae"] for by in ("by_one", "by_two")
    )
    assert len(by_one) == 3
    for name, numbers in by_one.items():
        for number, value in numbers.items():
            if value is not None:
                want = by_two[name][number]
                np.testing.assert_allclose(want, value, rtol=1e-4, atol=1e-5, err_msg=number)


@pytest.mark.soak
def test_four_processes_train_what_one_trains(alone, four):
    assert_same_run(four, alone)


@pytest.mark.soak
def test_preempted_and_killed_four_processes_end_together_and_go_on_bit_for_bit(inputs, four, tmp_path):
    c = tiny.run_config(inputs, **CHANGES)
    group = Hosts(to_train(c, tmp_path / "run"), tmp_path / "run", 4)
    group.wait_until_logged(12)
    group.processes[2].send_signal(signal.SIGTERM)
    assert group.wait() == [143] * 4, group.text()
    last = len((group.workdir / "metrics.jsonl").read_text().splitlines())
    assert f"SIGTERM: all hosts save step {last}, then leave." in group.outputs[0].read_text()
    assert (group.workdir / "checkpoints" / str(last)).exists()

    group = Hosts(to_train(c, tmp_path / "run"), tmp_path / "run", 4)
    group.wait_until_logged(last + 12)
    group.processes[1].kill()
    killed = time.monotonic()
    codes = group.wait()
    assert time.monotonic() - killed < 10 + 15, group.text()  # The heartbeat, and time to notice.
    assert all(codes), codes
    assert re.search(
        r"unhealthy \(stopped sending heartbeats\):\s+1\s", group.text()
    )  # JAX names the dead one.

    finish(c, tmp_path / "run", 4)
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path / "run"), state(four))
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(four))


def test_one_of_three_variables_is_not_enough(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"only JAX_NUM_PROCESSES is set; set all three, or none"):
        hosts.initialize(30)
