"""Hugging Face's hub: what a location there means, files fetched from it, and folders uploaded to it."""

import pathlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from gemma_scope_jax.runtime.errors import NotFoundError
from gemma_scope_jax.runtime.printing import printable

# As elsewhere of the hub's: a slash in a revision is %2F, but in those that it names itself, as refs/pr/3.
_LOCATION = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@(refs/[\w.-]+/[\w.-]+|[\w.%-]+))?(?:/([^@]*))?")
_ADDRESS = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(refs/[\w.-]+/[\w.-]+|[\w.%-]+)(/[^?#]*)?)?(?:[?#].*)?/?"
)


class Place(NamedTuple):
    """A folder of a repository on the hub."""

    repository: str
    revision: str | None
    folder: str


def refuse_address(location: str) -> None:
    """Raises ValueError if a location is a web address of the hub; the message says how it is given."""
    if match := _ADDRESS.fullmatch(location):
        repository, revision, inside = match[1], f"@{match[2]}" if match[2] else "", match[3] or ""
        raise NotFoundError(f"{location} is an address; give hf://{repository}{revision}{inside}")


def place_of(location: str) -> Place:
    """What `hf://OWNER/NAME@REVISION/FOLDER` means.

    Raises:
      ValueError: it is not of that form.
    """
    match = _LOCATION.fullmatch(location)
    revision = urllib.parse.unquote(match[2]) if match and match[2] else None
    if not match or ".." in [*location.split("/"), *(revision or "").split("/")]:
        raise NotFoundError(f"{location} is not hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@REVISION/FOLDER")
    return Place(match[1], revision, (match[3] or "").strip("/"))


def snapshot(location: str, place: Place, patterns: Sequence[str]) -> pathlib.Path:
    """Where the cache has those files of a repository whose names match a pattern; they are fetched if need be.

    Raises:
      ValueError: they are neither in the cache nor to be had.
    """
    import huggingface_hub  # Slow to import.
    from huggingface_hub import constants

    try:
        found = huggingface_hub.snapshot_download(
            place.repository, revision=place.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # Many kinds: no network, no such repository, terms not accepted.
        if constants.HF_HUB_OFFLINE:
            raise NotFoundError(not_cached(location)) from error
        reason = printable(" ".join(str(error).split()), 300)
        raise NotFoundError(
            f"cannot fetch {location} ({reason}); if it has terms, accept them and `hf auth login`"
        ) from error
    return pathlib.Path(found)


def not_cached(location: str) -> str:
    """What to say of a location that is not in the cache where the hub may not be asked."""
    from huggingface_hub import constants

    return (
        f"{location} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub; "
        "fetch it once without that variable"
    )


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
        raise NotFoundError(
            f"cannot push to {repository} ({reason}); log in with `hf auth login`, then `hf upload "
            f"{repository} {folder}`"
        ) from error
    return str(url)
