"""Where results are written."""

import pathlib

from gemma_scope_jax.runtime import files


def own_folder(location: str | pathlib.Path) -> pathlib.Path:
    """Where results of what lies at a location go: to the SAE or run; of a hub's, below the current folder."""
    if str(location).startswith("hf://"):
        parts = str(location).removeprefix("hf://").replace("*", "_").split("/")
        return pathlib.Path("evaluations", *parts)
    path, _ = files.matching(location)
    return path.parent if path.is_file() else path


def made_folder(
    location: str | pathlib.Path, out: pathlib.Path | None, label: pathlib.Path | None = None
) -> pathlib.Path:
    """The folder for results of what lies at a location, made before an hour's work and not after it.

    Args:
      location: of an SAE or run.
      out: the folder, if it is given; else it is `own_folder`.
      label: of results that do not belong there but below it, in `evaluations/LABEL`.

    Raises:
      ValueError: it is a file, or nothing can be written there.
    """
    if out is None:
        out = own_folder(location)
        out = out if label is None else out / "evaluations" / label
    files.check_output(out, is_folder=True)
    out.mkdir(parents=True, exist_ok=True)
    return out
