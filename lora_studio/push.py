"""Files of an export to a repository on the Hugging Face Hub, with a token that is used for this one call.

The token lives in the arguments of `push` and in the client it makes; it is written nowhere, and no error quotes what
a client says of a request.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from lora_studio.card import TAG
from lora_studio.errors import StudioError, quote, redacted
from lora_studio.export import SORTS
from lora_studio.hub import is_repo_name

log = logging.getLogger(__name__)

TOKEN = re.compile(r"[!-~]{8,4096}")  # what may stand in a header
ALWAYS_THERE = {".gitattributes"}
STALE = ["*.safetensors", "*.safetensors.index.json", *SORTS]  # of an earlier export: they would be loaded, too


def check_target(repo: str, token: str) -> None:
    """Raise E_HUB_NAME or E_HUB_TOKEN for what cannot be one, before anything is asked of the Hub."""
    if not is_repo_name(repo):
        hint = "Give a name of letters, digits, - _ and dots, or owner/name."
        raise StudioError("E_HUB_NAME", f"{quote(repo)} is no name for a repository.", hint)
    if not TOKEN.fullmatch(token):
        what = "is not one" if token else "is missing"
        hint = "Make one that may write at huggingface.co/settings/tokens. It is used once and not kept."
        raise StudioError("E_HUB_TOKEN", f"The Hub token {what}.", hint)


def push(files: Sequence[Path], folder: Path, repo: str, token: str, *, private: bool, title: str) -> str:
    """Upload these files of `folder`, and nothing else of it, in one commit; gives the address of the repository.

    repo: owner/name, or a name under the token's own account; made if it is not there. One that is there is written
    to only when it is empty or holds an export of this app, and is as private as asked; weights that the new ones
    replace are removed. Raises E_HUB_NAME, E_HUB_TOKEN, E_HUB_TAKEN, E_HUB_OFFLINE and E_HUB.
    """
    check_target(repo, token)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub, names = HfApi(token=token), {file.relative_to(folder).as_posix(): file for file in files}
    with _named_errors(repo):
        made = hub.create_repo(repo, private=private, exist_ok=True)
        there = hub.model_info(made.repo_id)
        held = {file.rfilename for file in there.siblings or ()} - ALWAYS_THERE
        if held and TAG not in (there.tags or ()):
            message = f"{made.repo_id} is there already and was not made by this app."
            raise StudioError("E_HUB_TAKEN", message, "Give another name.")
        if bool(there.private) != private:
            message = f"{made.repo_id} is there already and is {'private' if there.private else 'public'}."
            raise StudioError("E_HUB_TAKEN", message, "Give another name, or change the repository's settings first.")
        stale = {name for name in held - names.keys() if any(fnmatch(name, pattern) for pattern in STALE)}
        changes = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in names.items()]
        gone = [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
        hub.create_commit(made.repo_id, [*changes, *gone], commit_message=title)
    return str(made)


@contextmanager
def _named_errors(repo: str) -> Iterator[None]:
    """What goes wrong with the Hub in words of ours. The client's own error is left behind with all that it knows."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    offline = StudioError("E_HUB_OFFLINE", "The Hub does not answer.", "Try again when it can be reached.")
    try:
        yield
    except StudioError:
        raise
    except HfHubHTTPError as error:
        raise _refusal(repo, error.response.status_code, error.server_message or "") from None
    except (HTTPError, OSError) as error:
        log.warning("the Hub did not answer: %s", type(error).__name__)
        raise offline from None
    except (RuntimeError, ValueError) as error:  # of one file of several; of the metadata that the Hub checks
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refusal(repo, error.__cause__.response.status_code, str(error.__cause__.server_message)) from None
        log.warning("the upload failed: %s", type(error).__name__)
        raise offline from None


def _refusal(repo: str, status: int, said: str) -> StudioError:
    said = quote(redacted(said), 160)
    if status == 401:
        return StudioError("E_HUB_TOKEN", "The Hub does not know this token.", "Copy it again, or make a new one.")
    if status == 403:
        hint = "Take a token with the right to write, and a place of your own."
        return StudioError("E_HUB_TOKEN", f"This token may not write to {quote(repo)}.", hint)
    if status in (400, 404, 409, 422):
        return StudioError("E_HUB_NAME", f"The Hub refused {quote(repo)}: {said}.", "Give another name.")
    if status == 429:
        return StudioError("E_HUB", "The Hub says that there were too many calls.", "Wait a minute.")
    return StudioError("E_HUB", f"The Hub answered {status}: {said}.", "Try again later.")
