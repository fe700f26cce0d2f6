"""The Hugging Face hub. No other file reads from it or writes to it.

Nothing here runs unless the user named an id that is no local path, or pushes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from d2c_mlx.utils.errors import D2CError, InputError, gather
from d2c_mlx.utils.progress import Progress

T = TypeVar("T")
# Repositories at once: an adapter is small, so most of the time is waiting for answers.
_AT_ONCE = 8
# An error of the client -> what to do about it.
_TODO = {
    "GatedRepoError": "it is gated: ask for access on its page, log in with `hf auth login`",
    "RevisionNotFoundError": "check what follows the @",
    "RepositoryNotFoundError": "there is no such model, or it is private: check the id, or log in"
    " with `hf auth login`",
}
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?")


@dataclass(frozen=True)
class HubId:
    """A model repository, `owner/name`, and a branch, tag or commit; None is the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_id(text: str) -> HubId | None:
    """Parse `owner/name` or `owner/name@revision`; None if the text is neither."""
    match = _ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def download(
    hub: HubId, patterns: Sequence[str], field: str, error: type[InputError]
) -> tuple[Path, str]:
    """Download files of a repository, or find them in the hub's cache on this machine.

    Args:
        hub: the repository.
        patterns: patterns of the files that are needed; `*` stands for slashes too.
        field: the option that named the repository, for messages.
        error: class of the error to raise.

    Returns:
        The directory, which does not exist if no file fits the patterns, and its commit.

    Raises:
        InputError: `error`, if there is no such repository or revision, no access, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    # It would warn that no file fits the patterns, and of every retry.
    logging.set_verbosity_error()
    with _translate_errors(hub, field, error):
        path = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=list(patterns))
    # The cache is laid out as snapshots/<commit>.
    return Path(path), Path(path).name


def download_all(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run calls that download an adapter each, some at once, with one bar for all.

    The client goes on with a file after its connection broke. What is complete stays in the hub's
    cache, so the same calls after an interruption ask for the other files alone.

    Returns:
        Their results, in the order of the calls.

    Raises:
        InputError: the problems of all calls that failed.
    """
    from huggingface_hub import utils

    quiet = utils.are_progress_bars_disabled()  # By $HF_HUB_DISABLE_PROGRESS_BARS, say.
    pool = ThreadPoolExecutor(_AT_ONCE)
    utils.disable_progress_bars()
    try:
        with Progress(not quiet, unit="adapters").section("download") as bar:
            bar.expect(len(calls))

            def run(call: Callable[[], T]) -> T:
                result = call()
                bar.advance(1)
                return result

            return gather([pool.submit(partial(run, call)).result for call in calls])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not quiet:
            utils.enable_progress_bars()


def list_files(hub: HubId, field: str, error: type[InputError]) -> list[str]:
    """List the paths of all files of a repository. Arguments and errors are those of `download`."""
    from huggingface_hub import HfApi

    with _translate_errors(hub, field, error):
        return HfApi().list_repo_files(hub.repo, revision=hub.revision)


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # Each major version of the client has another HTTP library, whose errors are the bases of its
    # own. A wrong id is a ValueError, being offline an OSError.
    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def _reason(caught: Exception) -> str:
    lines = str(caught).strip().splitlines()
    return f"{type(caught).__name__}: {lines[0]}" if lines else type(caught).__name__


@contextmanager
def _translate_errors(hub: HubId, field: str, error: type[InputError]) -> Iterator[None]:
    """Raise `error`, with what to do, for every error of the client inside the block."""
    try:
        yield
    except _failures() as caught:
        todo = _TODO.get(type(caught).__name__, "check the id and the network")
        raise error(
            f"{field}: {str(hub)!r} is no local path, and the hub did not give it"
            f" ({_reason(caught)}); {todo}, or give a local directory"
        ) from None


def upload(
    folder: Path, repo: str, private: bool, revision: str | None, replaced: Sequence[str]
) -> str:
    """Upload a folder as one commit; the repository is created if need be.

    Args:
        folder: the files to upload.
        repo: `owner/name`.
        private: create a new repository as private, and refuse one that is public.
        revision: a branch, created if need be; None is the default one.
        replaced: patterns of files to delete there if they are not in the folder.

    Returns:
        The URL of the commit.

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
