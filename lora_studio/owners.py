"""Who owns a run or a dataset: a short name made from what only that visitor has, and where it is kept.

On a laptop there is one owner, "", and no ceremony. On a Space it is the account that is signed in, else a secret in
the browser's cookie; the secret itself is never stored, so that nothing found in a folder opens anything.
"""

import hashlib
import re
import secrets
from pathlib import Path
from typing import Literal

NOBODY = ""  # the owner on a laptop, and of what the command line makes
SECRET = re.compile(r"[0-9a-f]{32}")  # 128 bits


def new_secret() -> str:
    """What a browser keeps to show that it is the same visitor."""
    return secrets.token_hex(16)


def owner_name(kind: Literal["account", "visitor"], known_by: str) -> str:
    """The owner's name, 32 hex digits: of an account by its id, of a visitor by the secret."""
    return hashlib.sha256(f"{kind}:{known_by}".encode()).hexdigest()[:32]


def home(root: Path, owner: str) -> Path:
    """The folder in which an owner's datasets are kept."""
    assert not owner or re.fullmatch(r"[0-9a-f]{32}", owner), "an owner's name is made by owner_name"
    return root / "owners" / owner if owner else root
