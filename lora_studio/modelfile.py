"""How a model wants to be spoken to, for a program that has no Jinja: Ollama's Modelfile.

A chat template is a program; Ollama's templates, in Go's language, can say less. Many chat templates only frame each
turn by its role, though. Whether one does is found out by asking it: what stands around the words of a few
conversations is taken for the frames, and they must give the text of other conversations letter by letter. Where they
do not, TEMPLATE is left out and the Modelfile says why. White space around somebody's words is kept, which some
templates strip. The mark that begins a text is left out, since Ollama puts it there itself.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_studio.data.formats import Message
from lora_studio.data.words import rendered
from lora_studio.errors import StudioError

ROLES = ("system", "user", "assistant")
S, U, A, V, B, W = "Be brief 7q", "First\n words 1z", "An answer 4x", "Second 2y", "Another 5w", "Third 3k"
SHORT = (("user", U),)
LONG = (*SHORT, ("assistant", A), ("user", V))
TOLD = (("system", S), *SHORT)
TRIALS = (SHORT, LONG, TOLD, (("system", S), *LONG), (*TOLD, *LONG[1:], ("assistant", B), ("user", W)))


@dataclass(frozen=True)
class Turns:
    """A template that only frames turns: what stands before and behind the words of each role.

    reply: where the assistant begins to speak. opening: a mark in front of all. system: what the template says itself
    where no system turn is given.
    """

    frames: Mapping[str, tuple[str, str]]
    reply: str
    opening: str = ""
    system: str = ""

    def text(self, turns: Sequence[tuple[str, str]]) -> str:
        """A conversation as one text, up to where the assistant answers."""
        if self.system and turns[0][0] != "system":
            turns = [("system", self.system), *turns]
        framed = [f"{self.frames[role][0]}{words}{self.frames[role][1]}" for role, words in turns]
        return "".join([self.opening, *framed, self.reply])


def turns_of(tokenizer: Any) -> Turns | None:
    """The frames of a tokenizer's chat template (or of the plain one it gets here); None where it does more."""
    try:
        (start,) = _rendered(tokenizer, [SHORT], reply=False)
        texts = _rendered(tokenizer, TRIALS)
    except StudioError:  # it refuses one of them, such as a system turn
        return None
    guesses = _guesses(start, *texts[:3], tokenizer.bos_token or "")
    return next((one for one in guesses if [one.text(trial) for trial in TRIALS] == texts and _sayable(one)), None)


def _sayable(turns: Turns) -> bool:
    """Whether the frames hold nothing that a Modelfile would read as its own."""
    parts = (*(part for frame in turns.frames.values() for part in frame), turns.reply, turns.system)
    quoted = turns.reply.endswith('"') or turns.system.strip('"') != turns.system
    return not quoted and not any(mark in part for part in parts for mark in ("{", "}", '"""'))


def _rendered(tokenizer: Any, conversations: Sequence[Any], *, reply: bool = True) -> list[str]:
    talks = [[Message(role, words) for role, words in turns] for turns in conversations]
    return rendered(tokenizer, talks, reply=reply)


def _guesses(start: str, short: str, long: str, told: str, bos: str) -> Iterator[Turns]:
    """Frames that may be right; only a trial tells. start: the first conversation without the assistant's beginning."""
    if not short.startswith(start) or any(text.count(words) != 1 for text, words in ((long, A), (long, V), (told, S))):
        return
    head, _, user_behind = start.partition(U)
    answer_before, _, rest = long.partition(U)[2].partition(A)
    joint, _, _ = rest.partition(V)  # what ends an answer, then what begins the user's turn
    system_before, _, told_joint = told.partition(U)[0].partition(S)
    openings = ("", bos) if bos and told.startswith(bos) else ("",)
    shared = _common_end(head, joint, told_joint)
    ends = dict.fromkeys((joint.removeprefix(user_behind), shared))  # all turns end alike, or do not
    for opening, user_before in itertools.product(openings, ends):
        system = system_before.removeprefix(opening), told_joint.removesuffix(user_before)
        own = head.removesuffix(user_before).removeprefix(opening)
        frames = {
            "system": system,
            "user": (user_before, user_behind),
            "assistant": (answer_before.removeprefix(user_behind), joint.removesuffix(user_before)),
        }
        own = own.removeprefix(system[0]).removesuffix(system[1])
        yield Turns(frames, short.removeprefix(start), opening, own)


def _common_end(*texts: str) -> str:
    """The longest text that all of them end with."""
    length = 0
    for signs in zip(*(reversed(text) for text in texts), strict=False):
        if len(set(signs)) > 1:
            break
        length += 1
    return texts[0][len(texts[0]) - length :]


def modelfile(tokenizer: Any, turns: Turns | None, source: Sequence[str]) -> str:
    """A Modelfile. source: its first lines, which say where the weights are."""
    lines = [*source]
    if turns is None:
        lines += [
            "# TEMPLATE is left out: the chat template of this model does more than Ollama's can say letter by letter.",
            "# Ollama then takes the one that it knows for the model; the exact prompt is in README.md.",
        ]
    else:
        which = ["{{ if ", "{{ else if ", "{{ else if "]
        cases = [
            f'{begins}eq .Role "{role}" }}}}{turns.frames[role][0]}{{{{ .Content }}}}{turns.frames[role][1]}'
            for begins, role in zip(which, ROLES, strict=True)
        ]
        template = f"{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{turns.reply}"
        lines.append(f'TEMPLATE """{template}"""')
        if turns.system:
            lines.append(f'SYSTEM """{turns.system}"""')
    marks = [tokenizer.eos_token, turns.frames["assistant"][1].strip() if turns else None]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    stops = [mark for mark in dict.fromkeys(marks) if mark and mark in special]
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(mark, ensure_ascii=False)}" for mark in stops)]) + "\n"
