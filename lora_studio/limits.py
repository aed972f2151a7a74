"""Limits: how much one visitor, one file and one folder may ask for. Every bound of the app stands here.

A laptop has one person on it, who may fill it; a Space has strangers, who share two cores and a disk that is lost.
Where a machine of one's own tells visitors apart (LORA_STUDIO_VISITORS=1) they may fill it, but not borrow from it.
"""

import math
import os
from dataclasses import dataclass, replace

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The defaults are a laptop's; `math.inf` stands for no bound."""

    # one dataset
    file_bytes: int = 2048 * MIB
    text_bytes: int = 256 * MIB  # of a txt file, which is held whole
    decoded_bytes: int = 1024 * MIB  # of all values together, about as Python holds them
    rows: int = 5_000_000
    row_bytes: int = 16 * MIB
    columns: int = 256
    depth: int = 64

    # a process that reads what a stranger wrote: rows, chat templates, token counts
    reading_s: float = 300
    reading_cpu_s: float = 60
    reading_bytes: int = 4 * GIB  # of memory
    tokenising_s: float = math.inf  # of a processor, for all rows of a dataset together

    # runs; of one owner, unless it says otherwise
    running: float = math.inf  # the device's queue is a bound already
    queued: float = 200
    queued_by_all: float = 1000
    steps: float = math.inf
    minutes: float = math.inf  # of training, measured by the worker
    tokens: float = math.inf  # per row
    rank: float = 1024
    parameters: float = math.inf  # of a base model

    # the disk; of one owner, unless it says otherwise
    kept_runs: float = math.inf
    kept_bytes: float = math.inf
    kept_bytes_by_all: float = math.inf
    models_bytes: float = math.inf  # of models fetched from the Hub that are not the catalogue's, of all
    reserve_bytes: int = 512 * MIB  # that stay free: with less, nothing new begins
    idle_hours: float = math.inf  # after which what has ended is deleted
    log_bytes: int = 50 * MIB  # of what a worker prints; the newest half stays
    journal_bytes: int = GIB  # of a run's events; with more, answers to samples are left out

    note_characters: int = 4_000  # about one run, by its owner

    # memory
    rows_at_hand: int = 32 * MIB  # that a visitor's Studio keeps of what it read last; larger ones share one place

    # answers
    prompt_characters: int = 32_000
    answer_tokens: int = 2048
    answers_at_once: int = 16  # in one batch, beside the base model's
    prompts: int = 500  # of one set
    set_tokens: int = 2_000_000  # of all answers to a set of prompts together, at most

    # a page asks at most this often; others wait for nobody who asks more
    calls_a_minute: float = math.inf
    starts_a_minute: float = math.inf
    calls_waiting: float = math.inf  # in the page's own queue, which has one room for all
    call_bytes: int = 64 * MIB  # of one call that is no upload
    uploaded_bytes: float = math.inf  # from one address within ten minutes

    local_paths: bool = True  # whether files and folders of this machine may be named
    host_login: bool = True  # whether the machine's own login at the Hub fetches for whoever asks
    known_architectures: bool = False  # whether a model must be of a type in core.layout's table


LAPTOP = Limits()
SPACE = Limits(
    file_bytes=50 * MIB,
    text_bytes=50 * MIB,
    decoded_bytes=500 * MIB,
    rows=200_000,
    row_bytes=MIB,
    columns=64,
    depth=32,
    reading_s=60,
    reading_cpu_s=30,
    reading_bytes=2 * GIB,
    tokenising_s=60,
    running=1,
    queued=2,
    queued_by_all=20,
    steps=2_000,
    minutes=30,
    tokens=1_024,
    rank=64,
    parameters=600e6,
    kept_runs=10,
    kept_bytes=GIB,
    kept_bytes_by_all=20 * GIB,
    models_bytes=20 * GIB,
    reserve_bytes=2 * GIB,
    idle_hours=24,
    log_bytes=5 * MIB,
    journal_bytes=64 * MIB,
    prompt_characters=8_000,
    answer_tokens=256,
    answers_at_once=4,
    prompts=20,
    set_tokens=12_800,
    calls_a_minute=600,
    starts_a_minute=6,
    calls_waiting=16,
    call_bytes=8 * MIB,
    uploaded_bytes=200 * MIB,
    local_paths=False,
    host_login=False,
    known_architectures=True,
)
SHARED = replace(
    LAPTOP,
    tokenising_s=300,
    calls_a_minute=SPACE.calls_a_minute,
    starts_a_minute=SPACE.starts_a_minute,
    calls_waiting=SPACE.calls_waiting,
    call_bytes=SPACE.call_bytes,
    uploaded_bytes=4 * LAPTOP.file_bytes,
    local_paths=False,
    host_login=False,
    known_architectures=True,
)


def limits_here() -> Limits:
    """SPACE on a Hugging Face Space, SHARED where visitors are told apart elsewhere, else LAPTOP."""
    if os.environ.get("SPACE_ID"):
        return SPACE
    return SHARED if os.environ.get("LORA_STUDIO_VISITORS") == "1" else LAPTOP
