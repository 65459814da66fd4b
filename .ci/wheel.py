"""Trains, evaluates and exports the small model with an installed package, as .ci/wheel has it do.

    python wheel.py train|evaluate|export FOLDER

FOLDER is one for the inputs, the run and what is exported. A copy of tests/tiny.py must lie beside this file.
"""

import dataclasses
import json
import pathlib
import sys

import tiny

import gemma_scope_jax
from gemma_scope_jax.training import config_files


def check_place() -> None:
    """Everything comes from the environment, nothing from a checkout."""
    package = pathlib.Path(gemma_scope_jax.__file__).resolve()
    environment = pathlib.Path(sys.prefix).resolve()
    assert environment in package.parents, f"the package is {package}, outside of {environment}"
    assert (package.parent / "py.typed").exists(), "py.typed is missing from the wheel"
    found = config_files.find("quickstart")[0].resolve()
    assert found == package.parent / "configs" / "quickstart.py", f"the quickstart's config is {found}"


def train(folder: pathlib.Path) -> None:
    """A run of a few steps, in `run`."""
    tiny.lay_out(folder)
    made = tiny.run_config(folder, evaluation__rows=4)
    call_tiny({"config": dataclasses.asdict(made), "workdir": str(folder / "run")})
    steps = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert steps, "no step was logged"


def evaluate(folder: pathlib.Path) -> None:
    """The run's numbers, in `evaluated`."""
    out = folder / "evaluated"
    call_tiny({"evaluate": {"path": str(folder / "run"), "rows": 4, "out": str(out)}})
    assert json.loads((out / "evaluation.json").read_text()), "the evaluation is empty"
    for name in ("evaluation.html", "evaluation.png"):
        assert (out / name).stat().st_size > 1000, f"{name} is empty"


def export(folder: pathlib.Path) -> None:
    """The run's SAE as SAELens reads it, in `exported`."""
    tiny.register()
    from gemma_scope_jax.training import export as export_lib

    (place,) = export_lib.export_run(folder / "run", ("saelens",), folder / "exported")
    assert list(place.rglob("*.safetensors")), f"{place} has no SAE"


def call_tiny(given: dict) -> None:
    """What `python tiny.py JSON` does."""
    sys.argv[1:] = [json.dumps(given)]
    tiny.main()


def main() -> None:
    """Does one of the three."""
    name, folder = sys.argv[1:]
    check_place()
    {"train": train, "evaluate": evaluate, "export": export}[name](pathlib.Path(folder).resolve())


if __name__ == "__main__":
    main()
