"""The whole corpus of bad inputs: 135 numbers of the design's list, most of them in several forms."""

from tests.bad import adapters, models, rows, settings  # noqa: F401  # each puts its cases on the bench
from tests.bad.bench import CASES, Bad
from tests.bad.corpus import Case, cases


def everything() -> list[Bad]:
    """The bad files and all the others."""
    return [*map(_of_file, cases()), *CASES]


def _of_file(case: Case) -> Bad:
    number, _, name = case.name.partition(" ")
    if not (number[0] == "D" and number[1:].isdigit()):
        number, name = "D00", case.name  # more of the kind, not in the list
    return Bad(number, name, case.code, lambda bench: bench.rows(case.file, case.content))
