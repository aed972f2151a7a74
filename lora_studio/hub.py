"""What a name on the Hugging Face Hub looks like; said once, for models and for datasets."""

import re

_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9_][\w-]*(\.[\w-]+)*", re.ASCII)
LONGEST = 96  # the Hub's own limit


def is_hub_id(text: str) -> bool:
    """owner/name as the Hub allows it; never a path, a URL or an option."""
    return len(text) <= LONGEST and "--" not in text and bool(_ID.fullmatch(text))
