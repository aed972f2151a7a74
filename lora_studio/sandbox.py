"""A function of this package run in a limited process: what a stranger wrote is read there, and nowhere else.

The child is a fresh interpreter in an empty folder, with an allow-listed environment, no input, no privileges to gain
and bounds on time, memory and files that the kernel keeps. Requests and answers are lines of JSON on a socket; what is
large goes through files; never pickle. A bound that is broken ends the child alone and is E_READING_LIMIT here.

What it is not: another user or another machine. It stops what costs too much and what crashes, not code that has
broken out of the interpreter. It does not know what the functions do.
"""

import ctypes
import errno
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_studio.errors import StudioError, quote
from lora_studio.limits import GIB, MIB, Limits

PLAIN = ("PATH", "LANG", "LANGUAGE", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH")
NETWORK = (  # only for a child that fetches; in small letters too
    *("HOME", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "XDG_CACHE_HOME"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
FIXED = {
    **{"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"},
    **{"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    **{"ARROW_DEFAULT_MEMORY_POOL": "system", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    **{"USE_TORCH": "0", "USE_TF": "0", "USE_JAX": "0"},  # datasets would import them
}
ANSWER_BYTES = 256 * MIB  # of one answer; whoever reads it holds it in memory
OPEN_FILES = 64
NO_NEW_PRIVILEGES, DUMPABLE = 38, 4  # of prctl(2)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one call may take."""

    wall_s: float
    cpu_s: float
    memory: int = 2 * GIB  # bytes of address space, the interpreter's own included
    on_top: bool = False  # whether what an earlier call has left in the child's memory does not count

    @classmethod
    def of(cls, limits: Limits) -> "Bounds":
        """The bounds of reading one file."""
        return cls(wall_s=limits.reading_s, cpu_s=limits.reading_cpu_s, memory=limits.reading_bytes)


class Sandbox:
    """One child, begun at the first call and begun anew after one that broke a bound; calls wait for each other.

    file_bytes: the largest file it may write. network: whether it is told how to reach the Hub.
    """

    def __init__(self, *, file_bytes: int = 0, network: bool = False) -> None:
        self._file_bytes, self._network = file_bytes, network
        self._busy = threading.Lock()
        self._child: _Child | None = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: str, *arguments: Any, bounds: Bounds) -> Any:
        """What `function` ("module:name") returns; arguments and value are plain JSON.

        A StudioError comes across as it is. Raises E_READING_LIMIT, and E_READING for what should not happen.
        """
        with self._busy:
            if self._child is None:
                self._child = _Child(self._file_bytes, self._network)
            whole = False
            try:
                answer = self._child.ask(function, arguments, bounds)
                whole = "broken" not in answer
            finally:
                if not whole:
                    self._end()
        if "broken" in answer:
            raise _limit(answer["broken"], bounds)
        if "error" in answer:
            raise StudioError(*answer["error"])
        if "failed" in answer:
            raise _failure(answer["failed"])
        return answer["value"]

    def close(self) -> None:
        """End the child; a later call begins another."""
        with self._busy:
            self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child:
            child.end()


def once(function: str, *arguments: Any, bounds: Bounds, file_bytes: int = 0, network: bool = False) -> Any:
    """As Sandbox.call, in a child that has read nothing before and nothing after."""
    with Sandbox(file_bytes=file_bytes, network=network) as box:
        return box.call(function, *arguments, bounds=bounds)


# ---- the parent's side -----------------------------------------------------------------------------------------------


class _Child:
    """A process and the socket to it."""

    def __init__(self, file_bytes: int, network: bool) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lora-studio-reads-", ignore_cleanup_errors=True)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lora_studio.sandbox", str(theirs.fileno()), str(file_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # whatever it prints may quote what it reads
                cwd=self._folder.name,
                env=environment(self._folder.name, network=network),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def ask(self, function: str, arguments: tuple, bounds: Bounds) -> dict[str, Any]:
        """Its answer, or {"broken": which bound}; raises E_READING when it ended for no bound."""
        asked = {"function": function, "arguments": arguments, "bounds": asdict(bounds)}
        deadline = time.monotonic() + bounds.wall_s
        said = bytearray()
        try:
            self._wait_until(deadline)
            self._socket.sendall(json.dumps(asked).encode() + b"\n")
            while not said.endswith(b"\n"):
                self._wait_until(deadline)
                part = self._socket.recv(MIB)
                if not part:
                    return self._ended()
                said += part
                if len(said) > ANSWER_BYTES:
                    return {"broken": "disk"}
        except TimeoutError:
            return {"broken": "time"}
        except OSError:  # it ended before it had heard all
            return self._ended()
        return json.loads(said)

    def end(self) -> None:
        """It and whatever it started, at once."""
        self._socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _ended(self) -> dict[str, Any]:
        """Why it is no more: by the signal that the kernel sends at a bound."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return {"broken": "time"}
        if code == -signal.SIGXCPU:
            return {"broken": "work"}
        if code < 0:  # libraries that cannot get memory abort, or touch what they did not get
            return {"broken": "memory"}
        return {"failed": f"its process ended with {code}"}


def environment(folder: str, *, network: bool = False) -> dict[str, str]:
    """What the child may know: no token, no setting of ours, and unless it is to fetch no way to the network."""
    names = {*PLAIN, *(NETWORK if network else ()), *(map(str.lower, NETWORK) if network else ())}
    kept = {name: value for name, value in os.environ.items() if name in names or name.startswith("LC_")}
    here = str(Path(__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH", "")]))
    kept |= FIXED | {"TMPDIR": folder}
    return kept if network else kept | {"HOME": folder, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}


def _limit(which: str, bounds: Bounds) -> StudioError:
    most = {
        "work": f"{bounds.cpu_s:.3g} s of work",
        "time": f"{bounds.wall_s:.3g} s",
        "memory": f"{bounds.memory / GIB:.1f} GiB of memory",
        "disk": "the room for what comes of it",
    }[which]
    return StudioError("E_READING_LIMIT", f"Reading this took more than {most}.", "Split it, or take a part of it.")


def _failure(reason: str) -> StudioError:
    hint = "It was read apart from everything else; nothing was kept. Save it anew, or try another form of it."
    return StudioError("E_READING", f"This could not be read: {quote(reason, 120)}.", hint)


# ---- the child's side ------------------------------------------------------------------------------------------------


def serve(descriptor: int, file_bytes: int) -> None:
    """Answer at this socket until its other end closes."""
    _confine(file_bytes)
    with socket.socket(fileno=descriptor) as parent, parent.makefile("rb") as asked:
        for line in asked:
            answer = _run(json.loads(line))
            _allow(math.inf, math.inf)  # an answer is small, and the bound may be just reached
            parent.sendall(json.dumps(answer).encode() + b"\n")


def _run(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One call: imported without bounds, for that is our own code, and run within them."""
    module, _, name = asked["function"].partition(":")
    function = getattr(import_module(module), name)
    bounds = Bounds(**asked["bounds"])
    _allow(bounds.cpu_s, bounds.memory + (_held() if bounds.on_top else 0))
    try:
        return {"value": function(*asked["arguments"])}
    except StudioError as error:
        return {"error": [error.code, error.message, error.hint]}
    except MemoryError:
        return {"broken": "memory"}
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.ENOSPC):
            return {"broken": "disk"}
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _confine(file_bytes: int) -> None:
    """What holds for the child's whole life."""
    for kind, most in (("CORE", 0), ("FSIZE", file_bytes), ("NOFILE", OPEN_FILES)):
        _lower(f"RLIMIT_{kind}", most, for_good=True)
    with suppress(OSError, AttributeError):  # Linux has it
        library = ctypes.CDLL(None)
        library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        library.prctl(DUMPABLE, 0, 0, 0, 0)


def _allow(cpu_s: float, memory: float) -> None:
    """Bounds of the next piece of work; the kernel counts processor time from the beginning of the process."""
    _lower("RLIMIT_CPU", time.process_time() + cpu_s)
    _lower("RLIMIT_AS", memory)


def _held() -> int:
    """Bytes of address space that this process has now; 0 where the system does not say, nor bounds it."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def _lower(kind: str, most: float, *, for_good: bool = False) -> None:
    number = getattr(resource, kind)
    _, hard = resource.getrlimit(number)
    soft = resource.RLIM_INFINITY if most == math.inf else math.ceil(most)
    if hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard):
        soft = hard
    with suppress(ValueError, OSError):  # a system that does not know this one; the parent's clock still holds
        resource.setrlimit(number, (soft, soft if for_good else hard))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
