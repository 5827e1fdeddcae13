"""Access, upload, and the Hub's answers as one line each. The token is that of the environment."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)

# HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2; this file of both imports it.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from kd_trainer.hub.files import (
    CARD,
    OURS,
    PANEL,
    RESULTS,
    STUDENT,
    WEIGHTS,
    changes_loading,
)
from kd_trainer.replacing import MARKER

_HEAD = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)  # a card's metadata
_LOGIN = "Log in with `hf auth login`, or put a token that may write into HF_TOKEN."


@dataclass(frozen=True)
class Pushed:
    """Where something was pushed to, its commit, and whether that commit is new.

    `others` are the files of the repository that are not of this push.
    """

    url: str
    commit: str
    changed: bool
    others: tuple[str, ...] = ()


def check_access(repo_id: str, *, private: bool = True, force: bool = False) -> str:
    """Make sure of everything a push needs: a token, its permission, a repository fit for it.

    Args:
        repo_id: OWNER/NAME; the repository is made if there is none.
        private: make it private, and refuse one that is public; else the other way round.
        force: take a repository with other files that change how the student loads, or with a
            model or a card that was not pushed from here.

    Returns:
        Its address.

    Raises:
        PermissionError: if there is no token, or it may not write there.
        ConnectionError: if the Hub cannot be reached.
        ValueError: if the repository is public and should be private or the other way round, or
            holds such files, or another model.
    """
    with hub_errors(repo_id):
        api = HfApi()
        api.whoami()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # An existing repository counts as created, whoever may write to it.
        api.auth_check(repo_id, write=True)
        found = api.model_info(repo_id)
        names = {s.rfilename for s in found.siblings or ()}
        taken = sorted(names & {CARD, *STUDENT})
        foreign = bool(taken) and not _is_ours(repo_id, found.sha, names)
    if private and not found.private:
        raise ValueError(
            f"Expected {repo_id} to be private, got a public repository. Say that you mean it with "
            "--public (in a training --hub_private_repo false), or push to another id."
        )
    if found.private and not private:
        raise ValueError(
            f"Expected {repo_id} to be public, got a private repository. Leave --public out (in a "
            "training --hub_private_repo false), or change it in its settings on the Hub."
        )
    if not force:
        _check_others(repo_id, names - OURS)
    if foreign and not force:
        raise ValueError(
            f"Expected {repo_id} to be new or of an earlier push, got another {taken[0]}, which "
            "would be written over. Push to another id, or with push.py --force."
        )
    return str(url)


def _check_others(repo_id: str, names: set[str]) -> None:
    """Refuse files beside the student that would be loaded with it or in its place."""
    if loaded := changes_loading(names):
        raise ValueError(
            f"Expected nothing in {repo_id} that changes how the student loads, got "
            f"{', '.join(loaded)}. Delete it there, push to another id, or with push.py --force."
        )


def upload(
    folder: Path, repo_id: str, *, message: str, progress: bool = True, force: bool = False
) -> Pushed:
    """Push a folder as one commit; none is made if the repository holds these files already.

    What earlier pushes put there and this one does not is removed: curves, panel, results.
    Whatever else the repository holds stays. A repeated upload goes on with the large files that
    had not arrived.

    Args:
        folder: what is pushed, all of it.
        repo_id: OWNER/NAME of a repository that exists.
        message: of the commit.
        progress: show a bar for each large file.
        force: also beside files that change how the student loads.

    Raises:
        PermissionError: if the token may not write there.
        FileNotFoundError: if there is no such repository.
        ConnectionError: if the Hub cannot be reached or breaks off.
        ValueError: if it holds such files.
    """
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MARKER, None)
    with hub_errors(repo_id):
        api = HfApi()
        before = api.model_info(repo_id, files_metadata=True)
        stored = {s.rfilename: s.lfs.sha256 if s.lfs else None for s in before.siblings or ()}
        left = stored.keys() - files.keys()
        named = sorted(left & {PANEL, *RESULTS})
        stale = named if named and _is_ours(repo_id, before.sha, stored.keys()) else []
        others = left - set(stale)
        if not force:
            _check_others(repo_id, others - {PANEL, *RESULTS})
        operations: list[CommitOperationDelete | CommitOperationAdd] = [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ]
        # Where no large file is new, huggingface_hub would show a bar of nothing.
        news = files.get(WEIGHTS) and _sha256(files[WEIGHTS]) != stored.get(WEIGHTS)
        with _bars(shown=progress and bool(news)):
            # A commit of its own, because upload_folder may spread one push over several.
            commit = api.create_commit(repo_id, operations, commit_message=message)
    shown = tuple(sorted(others - {".gitattributes"}))
    url = f"{api.endpoint}/{repo_id}"
    return Pushed(url, commit.oid, commit.oid != before.sha, shown)


def _is_ours(repo_id: str, revision: str | None, stored: Set[str]) -> bool:
    """Whether the card in a repository is one of an earlier push, or as good as none.

    The Hub's page for new repositories writes a card that holds the licence and nothing else.
    """
    if CARD not in stored:
        return False
    path = Path(hf_hub_download(repo_id, CARD, revision=revision))
    card = path.read_text(encoding="utf-8", errors="replace")
    alone = stored <= {CARD, ".gitattributes"}
    return "kd_trainer" in card or (alone and not _HEAD.sub("", card).strip())


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line, and keep its log lines off the screen."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"Expected a token for the Hub, got none. {_LOGIN}") from error
    except RuntimeError as error:
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise _house_error(error.__cause__, repo_id) from error  # an upload in a thread of its own
    except (HTTPError, OfflineModeIsEnabled) as error:  # before ValueError: some are both
        raise _house_error(error, repo_id) from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata"):
            raise
        raise ValueError(
            f"Expected a card that the Hub accepts, got: {_one_line(str(error))}. Name a licence "
            "that the Hub knows."
        ) from error
    finally:
        logging.set_verbosity(level)


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Show huggingface_hub's bars or not, whatever a script has set for its small files."""
    before = not are_progress_bars_disabled()
    if shown == before or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield  # as it is, or as the user's environment has it
        return
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        yield
    finally:
        (enable_progress_bars if before else disable_progress_bars)()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _house_error(error: BaseException, repo_id: str) -> Exception:
    if isinstance(error, HfHubHTTPError):
        return _answer(error, repo_id)
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(
            f"Expected to reach the Hub for {repo_id}, got offline mode. Unset HF_HUB_OFFLINE."
        )
    return ConnectionError(
        f"Expected the Hub to answer, got {type(error).__name__} ({_one_line(str(error))}). "
        "Check the network and push again: what has arrived is not sent twice."
    )


def _answer(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    said = f"HTTP {status}"
    reason = error.server_message or error.response.headers.get("X-Error-Message")
    if reason:
        said += f" ({_one_line(reason)})"
    if status == 401:
        return PermissionError(f"Expected a valid token for {repo_id}, got {said}. {_LOGIN}")
    if status == 403:
        return PermissionError(
            f"Expected a token that may write to {repo_id}, got {said}. Give the token write "
            "access, or push to an owner that is you or an organisation of yours."
        )
    if status == 404:
        return FileNotFoundError(
            f"Expected the repository {repo_id} on the Hub, got {said}. Check the id, and that "
            "the token may see it."
        )
    return ConnectionError(f"Expected the Hub to accept {repo_id}, got {said}. Try again later.")


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
