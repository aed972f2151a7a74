"""What a name on the Hugging Face Hub looks like; said once, for models and for datasets."""

import re

_NAME = re.compile(r"[A-Za-z0-9_][\w-]*(\.[\w-]+)*", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9_][\w-]*(\.[\w-]+)*", re.ASCII)
LONGEST = 96  # the Hub's own limit


def is_hub_id(text: str) -> bool:
    """owner/name as the Hub allows it; never a path, a URL or an option."""
    return len(text) <= LONGEST and "--" not in text and bool(_ID.fullmatch(text))


def is_repo_name(text: str) -> bool:
    """What one may call a repository of one's own: a name as the Hub allows it, or owner/name."""
    return is_hub_id(text) or (len(text) <= LONGEST and "--" not in text and bool(_NAME.fullmatch(text)))
