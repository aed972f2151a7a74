"""Which words of one text are not those of another: what stands out when answers stand side by side."""

import re
from difflib import SequenceMatcher
from itertools import groupby

WORD = re.compile(r"\w+|\s+|[^\w\s]")


def changed_words(text: str, before: str) -> list[tuple[str, bool]]:
    """`text` in parts that give it again when joined, each with whether its words differ from those of `before`.

    Words, numbers and single marks are compared; the space between two that differ belongs to them. Of long texts,
    words that come again and again are only found beside others, so that a model's endless loop costs no minutes.
    """
    pieces = WORD.findall(text)
    places = [place for place, piece in enumerate(pieces) if not piece.isspace()]
    words, others = [pieces[place] for place in places], [word for word in WORD.findall(before) if not word.isspace()]
    alike = next((at for at, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1]), None)
    alike = min(len(words), len(others)) if alike is None else alike
    matches = SequenceMatcher(None, others[alike:], words[alike:]).get_matching_blocks()
    same = {*range(alike), *(alike + start + step for _, start, size in matches for step in range(size))}
    fresh = {place for number, place in enumerate(places) if number not in same}
    fresh |= {place for place, piece in enumerate(pieces) if piece.isspace() and {place - 1, place + 1} <= fresh}
    runs = groupby(enumerate(pieces), key=lambda one: one[0] in fresh)
    return [("".join(piece for _, piece in run), differs) for differs, run in runs]
