"""LoRA Studio's page: the entry point of the Space and of `python app.py`.

LORA_STUDIO_ROOT    where datasets, runs and models are kept (default: .lora-studio in the home folder)
LORA_STUDIO_HOST    address to listen on (default: 127.0.0.1, on a Space 0.0.0.0)
LORA_STUDIO_PORT    port (default: GRADIO_SERVER_PORT, else 7860)
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

import gradio  # noqa: F401  # first: the page is up before torch is imported

from lora_studio.errors import StudioError
from lora_studio.studio import Studio
from lora_studio.ui import style
from lora_studio.ui.build import build
from lora_studio.ui.desk import Desk


def address() -> tuple[str, int]:
    """Host and port to listen on. Raises E_PORT."""
    host = os.environ.get("LORA_STUDIO_HOST") or ("0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    port = os.environ.get("LORA_STUDIO_PORT") or os.environ.get("GRADIO_SERVER_PORT") or "7860"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise StudioError("E_PORT", f"The port is {port!r}.", "Give LORA_STUDIO_PORT a number up to 65535.")
    return host, int(port)


def main() -> None:
    """Serve until interrupted; workers that train go on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    host, port = address()
    desk = Desk(Studio())
    page = build(desk)
    page.queue(default_concurrency_limit=8, max_size=64)
    on_space = bool(os.environ.get("SPACE_ID"))
    page.launch(
        server_name=host,
        server_port=port,
        show_error=not on_space,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[str(desk.studio.exports)],  # where a download is packed, for Gradio to copy it
        **style.launch_options(),
    )
    print(f"LoRA Studio is at http://{host}:{port}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    desk.begin()
    desk.studio.supervisor.start()
    try:
        page.block_thread()
    finally:
        desk.studio.supervisor.close()
        page.close(verbose=False)


if __name__ == "__main__":
    try:
        main()
    except StudioError as error:
        sys.exit(f"{error.code}: {error}")
    except OSError as error:  # the port is taken
        sys.exit(str(error))
