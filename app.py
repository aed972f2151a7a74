"""LoRA Studio's page: the entry point of the Space and of `python app.py`.

LORA_STUDIO_ROOT         where datasets, runs and models are kept (default: .lora-studio in the home folder)
LORA_STUDIO_HOST         address to listen on (default: 127.0.0.1, on a Space 0.0.0.0)
LORA_STUDIO_PORT         port (default: GRADIO_SERVER_PORT, else 7860)
LORA_STUDIO_ORIGINS      addresses under which it is reached through a proxy: https://lora.example.org, ...
LORA_STUDIO_VISITORS=1   tell visitors apart by a cookie, as a Space does
LORA_STUDIO_MCP=1        be an MCP server, too, at /gradio_api/mcp/ (needs the package mcp; one person's machine only)
LORA_STUDIO_OPERATORS    accounts that see everybody's work on a Space, besides its author's
"""

import contextlib
import logging
import os
import signal
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  # type: ignore  # on ZeroGPU it must be there before anything touches CUDA

from lora_studio.errors import StudioError, redacted
from lora_studio.studio import Studio


class Discreet(logging.Formatter):
    """Log lines without tokens, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def address() -> tuple[str, int]:
    """Host and port to listen on. Raises E_PORT."""
    host = os.environ.get("LORA_STUDIO_HOST") or ("0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    port = os.environ.get("LORA_STUDIO_PORT") or os.environ.get("GRADIO_SERVER_PORT") or "7860"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise StudioError("E_PORT", f"The port is {port!r}.", "Give LORA_STUDIO_PORT a number up to 65535.")
    return host, int(port)


def main() -> None:
    """Serve until interrupted; workers that train go on."""
    printed = logging.StreamHandler()
    printed.setFormatter(Discreet("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[printed])
    for noisy in ("httpx", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    studio = Studio()
    studio.supervisor.own()  # a second app on one folder ends here, before seconds of importing
    os.environ["GRADIO_TEMP_DIR"] = str(studio.fresh_uploads())

    from lora_studio import door
    from lora_studio.ui import live, style
    from lora_studio.ui.build import build
    from lora_studio.ui.desk import Desk
    from lora_studio.visitors import told_apart

    place = door.place(*address())
    desk = Desk(studio, visitors=told_apart())
    page = build(desk)
    page.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    page._queue.sleep_when_free = 0.02  # s; Gradio looks a thousand times a second, a training beside it pays for that

    def ready() -> None:
        print(f"LoRA Studio is at {place.url}", flush=True)
        desk.begin()
        studio.supervisor.start()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = page, place, studio.limits, desk.pages, door.routes(desk.downloads, live.PLOTLY)
    try:
        if os.environ.get("SPACES_ZERO_GPU"):  # there, only what Gradio launches itself is given a GPU
            door.launch(*settings, style.looks(studio.limits))
            ready()
            page.block_thread()
        else:
            door.serve(door.behind(*settings, style.looks(studio.limits)), place, ready)
    except KeyboardInterrupt:
        pass
    finally:
        studio.supervisor.close()


if __name__ == "__main__":
    try:
        main()
    except StudioError as error:
        sys.exit(f"{error.code}: {error}")
    except OSError as error:  # the port is taken
        sys.exit(str(error))
