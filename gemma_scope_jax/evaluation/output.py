"""The folders that results are written to."""

import pathlib

from gemma_scope_jax.runtime import files


def own_folder(location: str | pathlib.Path) -> pathlib.Path:
    """The folder for the results of the SAEs at a location.

    It is the folder of the SAE or run; for a location on the hub, a folder below `evaluations` in the current one.
    """
    if str(location).startswith("hf://"):
        parts = str(location).removeprefix("hf://").replace("*", "_").split("/")
        return pathlib.Path("evaluations", *parts)
    path, _ = files.matching(location)
    return path.parent if path.is_file() else path


def made_folder(
    location: str | pathlib.Path, out: pathlib.Path | None, label: pathlib.Path | None = None
) -> pathlib.Path:
    """The folder for the results of the SAEs at a location, created before the work starts.

    Args:
      location: the path or address of an SAE or a run.
      out: the folder; None: `own_folder`.
      label: a path; results then go to `evaluations/LABEL` below `own_folder`. It has no effect with `out`.

    Raises:
      ValueError: if the folder is a file, or cannot be written to.
    """
    if out is None:
        out = own_folder(location)
        out = out if label is None else out / "evaluations" / label
    files.check_output(out, is_folder=True)
    out.mkdir(parents=True, exist_ok=True)
    return out
