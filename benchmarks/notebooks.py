"""Runs the notebooks of the tutorials.

    python -m benchmarks.notebooks [NAME ...]

executes them, each from its first cell on, and stores them with their outputs. They need runs/quickstart, which
`make quickstart` trains.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "tutorials"


def names_of(name: str) -> dict[str, object]:
    """The names that a notebook's cells define, run one after the other in this process."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names


def store(path: pathlib.Path) -> None:
    """Executes a notebook in the current folder and stores it with its outputs."""
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(path, as_version=4)
    ExecutePreprocessor(timeout=3600).preprocess(notebook, {"metadata": {"path": "."}})
    for cell in notebook.cells:  # When a cell ran says nothing to a reader.
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def main() -> None:
    """Executes the named notebooks, or all of them."""
    chosen = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in chosen:
        store(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
