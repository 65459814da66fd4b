"""SAEs in Hugging Face's repositories: fetched whole and checked, without what else lies there; and published."""

import fnmatch
import hashlib
import pathlib
import re

from gemma_scope_jax.formats import detect

_LOCATION = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?:/([^@]*))?")


def local(location: str) -> pathlib.Path:
    """A location as it can be opened: `hf://OWNER/NAME/FOLDER` becomes where Hugging Face's cache keeps that folder.

    An interrupted download goes on where it stopped. Only files that are SAEs' are fetched, no examples.

    Raises:
      ValueError: there is no such path or repository, or a file is not what the repository says it is.
    """
    if not location.startswith("hf://"):
        path = pathlib.Path(location).expanduser()
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        return path
    match = _LOCATION.fullmatch(location)
    if not match or ".." in location.split("/"):
        raise ValueError(f"{location} is not hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@REVISION/FOLDER")
    repository, revision, inside = match[1], match[2], (match[3] or "").strip("/")
    import huggingface_hub  # Slow to import.

    # Of a file, what lies beside it comes too: it says what the SAE is of.
    is_file = any(fnmatch.fnmatch(pathlib.PurePosixPath(inside).name, name) for name in detect.FILES)
    folder = str(pathlib.PurePosixPath(inside).parent) if is_file else inside
    patterns = [name if folder in ("", ".") else f"{folder}/{name}" for name in detect.FILES]
    try:
        root = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:  # Many kinds: no network, no such repository, terms not accepted.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot fetch {location} ({reason})") from error
    path = pathlib.Path(root, inside)
    if not path.exists():
        raise ValueError(f"{repository} has no SAE in {inside!r}")
    files = sorted((path if path.is_dir() else path.parent).iterdir())
    if damaged := [file.name for file in files if not _is_whole(file)]:
        raise ValueError(
            f"{', '.join(damaged)} of {location} arrived damaged, not of the digest that the hub gives; what was "
            "fetched is removed, fetch it again"
        )
    return path


def _is_whole(file: pathlib.Path) -> bool:
    """Compares a large file with the digest by which the cache calls it; removes it if it is another's.

    Once, since the cache never changes a file.
    """
    blob = file.resolve()
    mark = blob.with_name(f"{blob.name}.checked")
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or mark.exists():
        return True
    with blob.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found == blob.name:
        mark.touch()
        return True
    file.unlink()
    blob.unlink(missing_ok=True)
    return False


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder to a repository, which is made if there is none; returns its address.

    Raises:
      ValueError: it cannot be made or written to.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # Many kinds: no network, not logged in, no right to.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cannot push to {repository} ({reason}); log in with `hf auth login`, then `hf upload "
            f"{repository} {folder}`"
        ) from error
    return str(url)
