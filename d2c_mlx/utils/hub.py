"""The Hugging Face hub. No other file reads from it or writes to it.

Nothing here runs unless the user named an id that is no local path, or pushes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from d2c_mlx.utils.errors import D2CError, InputError

__all__ = ["HubId", "download", "head", "list_files", "parse_hub_id", "upload"]

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?")


@dataclass(frozen=True)
class HubId:
    """A model repository, `owner/name`, and a branch, tag or commit of it; None is its default."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_id(text: str) -> HubId | None:
    """`owner/name` or `owner/name@revision`; None if it is neither."""
    match = _ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def download(
    one: HubId, patterns: Sequence[str], field: str, error: type[InputError]
) -> tuple[Path, str]:
    """Files of a repository, from the hub or from its cache on this machine.

    Args:
        one: what the user named.
        patterns: of the files that are needed; `*` stands for slashes too.
        field: the option that it was named in, for the message.
        error: what to raise if they cannot be had.

    Returns:
        A directory, which is not there if nothing fits the patterns, and the commit that it is of.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    # It would warn that nothing fits the patterns, which the caller says better.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _asked(one, field, error):
            found = snapshot_download(
                one.repo, revision=one.revision, allow_patterns=list(patterns)
            )
    finally:
        logging.set_verbosity(verbosity)
    # The cache is laid out as snapshots/<commit>.
    return Path(found), Path(found).name


def list_files(one: HubId, field: str, error: type[InputError]) -> list[str]:
    """Paths of all files of a repository. Arguments as `download`."""
    from huggingface_hub import HfApi

    with _asked(one, field, error):
        return HfApi().list_repo_files(one.repo, revision=one.revision)


def head(one: HubId, file: str, nbytes: int, field: str, error: type[InputError]) -> bytes:
    """The first bytes of a file of a repository. Other arguments as `download`."""
    from huggingface_hub import HfFileSystem

    with (
        _asked(one, field, error),
        HfFileSystem().open(f"{one}/{file}", "rb", block_size=nbytes) as remote,
    ):
        return remote.read(nbytes)


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # Its HTTP library is another one in each major version; the base of its own errors is that
    # library's. A wrong id is a ValueError, being offline an OSError.
    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def _reason(caught: Exception) -> str:
    lines = str(caught).strip().splitlines()
    return f"{type(caught).__name__}: {lines[0]}" if lines else type(caught).__name__


@contextmanager
def _asked(one: HubId, field: str, error: type[InputError]) -> Iterator[None]:
    """What the client raises when the hub does not give something, in our words."""
    from huggingface_hub import constants, errors

    try:
        yield
    except _failures() as caught:
        todo = "check the id and the network"
        reason = _reason(caught)
        if isinstance(caught, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            # Its own words are about its options.
            reason = "the hub cannot be reached"
            if constants.HF_HUB_OFFLINE:
                reason = "HF_HUB_OFFLINE is set"
            reason += ", and it is not in the hub's cache on this machine"
        if isinstance(caught, errors.GatedRepoError):
            todo = f"{one.repo} is gated: ask for access on its page, log in with `hf auth login`"
        elif isinstance(caught, errors.RevisionNotFoundError):
            todo = f"{one.repo} has no revision {one.revision!r}: check what follows the @"
        elif isinstance(caught, errors.RepositoryNotFoundError):
            todo = "there is no such model, or it is private: check the id, or run `hf auth login`"
        raise error(
            f"{field}: {str(one)!r} is no local path, and the hub did not give it"
            f" ({reason}); {todo}, or give a local directory"
        ) from None


def upload(
    folder: Path, repo: str, private: bool, revision: str | None, replaced: Sequence[str]
) -> str:
    """Make a repository what a folder holds, in one commit; it is created if need be.

    Args:
        folder: all files that go up.
        repo: `owner/name`.
        private: make a new repository private, and refuse one that is public.
        revision: a branch, made if need be; None is the default one.
        replaced: patterns of files to delete there if they are not in the folder.

    Returns:
        The address of the commit.

    Raises:
        D2CError: not logged in, offline, no permission, or the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise D2CError(
            "push: not logged in; run `hf auth login` or set HF_TOKEN to a token that may write, or"
            " write the folder with --output DIR"
        )
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise D2CError(f"push: {repo} is there and public, expected private; nothing was sent")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Adapters packed by d2c-mlx",
            delete_patterns=list(replaced),
        )
    except _failures() as caught:
        status = getattr(getattr(caught, "response", None), "status_code", None)
        todo = "check the network"
        if status in (401, 403):
            todo = f"log in with a token that may write to {repo}: `hf auth login`"
        raise D2CError(
            f"push: the hub did not take {repo!r} ({_reason(caught)}); {todo}, or write the folder"
            " with --output DIR"
        ) from None
    return str(commit.commit_url)
