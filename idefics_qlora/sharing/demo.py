"""A page on this machine to try an adapter: pictures and a question, base and adapter side by side.

Nothing leaves the machine: the server listens on loopback alone, tells nobody, keeps what is
dropped in a folder that ends with it, and the page asks for nothing from elsewhere.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterable, Iterator
from hashlib import sha256
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from idefics_qlora.config import check_whole
from idefics_qlora.data.templates import trained_captions
from idefics_qlora.images.access import DEFAULT_ACCESS
from idefics_qlora.model.loading import load_finetuned
from idefics_qlora.sharing.side_by_side import Asked, SideBySide, asked_by

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100
"""Without a port of the user's own, the first of these many that is free is taken."""
MOST_TOKENS = 500
_NOTHING = "(nothing)"
"""Stands for an answer that ends at once."""


def demo(
    checkpoint: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    device: str | None = None,
    port: int | None = None,
    max_new_tokens: int = 50,
    open_browser: bool = False,
) -> None:
    """Serve the page until the process is stopped.

    Args:
        checkpoint: A run's folder, of which the best checkpoint is taken, a ``checkpoint-N``, or
            any adapter's folder.
        base: Hub id or folder of the base, if it is no longer where the adapter says.
        device: Where the model lives; by default the first GPU if there is one, else the CPU.
        port: Of loopback; ``None``: the first that is free from 7860 on, 0: any that is free.
        max_new_tokens: Tokens of an answer at most, as the page has it at first.
        open_browser: Whether to open the page in a browser.

    Raises:
        ValueError: If gradio is not installed, the port is in use, or the checkpoint cannot be
            loaded.
        KeyboardInterrupt: When the process is interrupted, after the server has ended.
        SystemExit: When it is told to end by SIGTERM.
    """
    check_whole(max_new_tokens=max_new_tokens)
    if max_new_tokens > MOST_TOKENS:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected {MOST_TOKENS} at most")
    if find_spec("gradio") is None:
        raise ValueError('demo needs the package gradio: pip install "idefics_qlora[demo]"')
    with _bound(port) as listening, tempfile.TemporaryDirectory() as uploads:
        options: dict[str, Any] = {} if device is None else {"device": device}
        model, processor = load_finetuned(checkpoint, base=base, **options)
        asked = asked_by(Path(checkpoint).expanduser(), trained_captions(processor))
        pair = SideBySide(model, processor, asked.max_length)
        # Read when it is imported, and at calls.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        name = Path(checkpoint).expanduser().absolute().name
        folders = {str(image.parent) for row in asked.rows for image in row.images}
        application = _application(_page(pair, asked, name, max_new_tokens), sorted(folders))
        address = f"http://{HOST}:{listening.getsockname()[1]}"
        print(f"{address} shows {name} on this machine alone; Ctrl-C ends it", flush=True)
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        _serve(application, listening, pair.ending)


def _bound(port: int | None) -> socket.socket:
    """A socket at the port; others cannot take it while the model is loaded.

    Raises:
        ValueError: If it is not free.
    """
    first, number = (FIRST_PORT, PORTS) if port is None else (port, 1)
    for each in range(first, first + number):
        bound = socket.socket()
        if os.name == "posix":  # elsewhere it would take the port from who has it
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST, each))
            bound.listen()  # from here on a browser is kept waiting, not turned away
            return bound
        except (OSError, OverflowError) as error:
            bound.close()
            if isinstance(error, OverflowError) or error.errno != errno.EADDRINUSE:
                raise ValueError(
                    f"port={port} cannot be used ({error}): expected a number from 1024 to 65535, "
                    "or none for the first that is free"
                ) from error
    if port is None:
        last = FIRST_PORT + PORTS - 1
        raise ValueError(f"the ports {FIRST_PORT} to {last} are all in use: pass a free one")
    raise ValueError(
        f"port={port} is in use by another program: pass another one, or none for the first that "
        "is free"
    )


_STYLE = """
.told p { padding: .6em .8em; border-left: 4px solid #b45309; margin: 0 0 .4em; }
.told p.right { border-left-color: #047857; }
footer { display: none !important; }
"""


def _page(pair: SideBySide, asked: Asked, name: str, max_new_tokens: int) -> Any:
    import gradio as gr

    def answer(
        pictures: list[tuple[str, Any]] | None,
        text: str,
        is_dialogue: bool,
        tokens: int,
    ) -> Iterator[tuple[str, str, str]]:
        yield "", "", ""
        try:
            images = [Path(file) for file, _ in pictures or ()]
            question = pair.read(images, text or "", is_dialogue, tokens)
            told = _told(question.notes, right.get(_key(images, text), ""))
            base = pair.base(question, tokens)
            yield told, base or _NOTHING, ""
            yield told, base or _NOTHING, pair.adapter(question, tokens) or _NOTHING
        except (ValueError, TypeError, torch.OutOfMemoryError) as error:
            yield _told([str(error)]), "", ""
        except Exception as error:  # of a library; a page that says nothing would be no help
            logger.exception("what was asked on the page could not be answered")
            what = f"{type(error).__name__}: {error}"
            yield _told([f"This went wrong ({what}); the terminal shows where."]), "", ""

    def take(number: int) -> tuple[Any, ...]:
        row = asked.rows[number]
        return [*map(str, row.images)], row.question, _told([], row.right), "", ""

    right = {_key(row.images, row.question): row.right for row in asked.rows}
    with gr.Blocks(title=f"{name}: base and adapter", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{escape(name)}: what the base says, and what the adapter has learnt</h1>")
        with gr.Row():
            with gr.Column():
                pictures = gr.Gallery(
                    label="Pictures: drop one or several",
                    file_types=["image"],
                    columns=2,
                    fit_columns=False,
                    height=320,
                    object_fit="contain",
                    interactive=True,
                    buttons=[],
                    elem_id="pictures",
                )
                text = gr.Textbox(
                    label="Question",
                    value=asked.question,
                    placeholder="" if asked.question or not asked.rows else asked.rows[0].question,
                    info="Stands behind the pictures; as in training it is answered best.",
                    max_lines=6,
                    elem_id="question",
                )
                with gr.Accordion("How it is asked", open=False):
                    is_dialogue = gr.Checkbox(
                        label="As a turn of a dialogue",
                        value=asked.is_dialogue,
                        info="So are rows of questions and answers; without it the text is as it "
                        "is.",
                        elem_id="dialogue",
                    )
                    tokens = gr.Slider(
                        *(1, MOST_TOKENS, max_new_tokens),
                        step=1,
                        label="Tokens of an answer at most",
                        elem_id="tokens",
                    )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                told = gr.HTML(elem_id="told", elem_classes="told")
                with gr.Row():
                    said = [
                        gr.Textbox(
                            label=label, lines=6, interactive=False, min_width=240, elem_id=elem_id
                        )
                        for label, elem_id in (("Base", "base"), ("With the adapter", "adapter"))
                    ]
        if asked.rows:
            rows = _rows(asked)
            rows.click(
                take, rows, [pictures, text, told, *said], queue=False, api_visibility="private"
            )
        gr.on(
            [ask.click, text.submit],
            answer,
            [pictures, text, is_dialogue, tokens],
            [told, *said],
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


def _key(images: Iterable[Path], question: str) -> tuple[str, ...]:
    """Tells whether pictures and question are those of a row, whatever the files are called."""
    return (question, *(sha256(image.read_bytes()).hexdigest() for image in images))


def _rows(asked: Asked) -> Any:
    """The held-out rows to choose from; their question is shown where each has its own."""
    import gradio as gr

    columns: dict[str, tuple[Any, list[Any]]] = {
        "Pictures": (gr.Gallery, [[*map(str, row.images)] for row in asked.rows]),
        "Question": (gr.Textbox, [row.question for row in asked.rows]),
        "Right text": (gr.Textbox, [row.right for row in asked.rows]),
    }
    if asked.question:
        del columns["Question"]
    kinds, values = zip(*columns.values(), strict=True)
    return gr.Dataset(
        label="Held-out rows of the run",
        components=[kind(render=False) for kind in kinds],
        headers=[*columns],
        samples=[list(row) for row in zip(*values, strict=True)],
        type="index",
        elem_id="rows",
    )


def _told(lines: list[str], right: str = "") -> str:
    """Lines for who asks, and what was to be said; empty without any."""
    shown = "".join(f"<p>{escape(line)}</p>" for line in lines)
    alert = f'<div role="alert">{shown}</div>' if shown else ""
    return alert + (f'<p class="right">Right text: {escape(right)}</p>' if right else "")


def _application(page: Any, folders: list[str]) -> Any:
    """What answers requests; of files it takes those that were dropped, and those in folders."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    outer = FastAPI(openapi_url=None)
    # A site whose name is made to lead to this machine could else read along in a browser here.
    outer.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    # Only then it looks whether a file that is asked about was dropped, or any of this machine's.
    page.has_launched = True
    fonts = ["system-ui", "sans-serif"]
    page.queue(api_open=False)
    return gr.mount_gradio_app(
        outer,
        page,
        path="/",
        server_name=HOST,
        allowed_paths=folders,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=DEFAULT_ACCESS.max_bytes,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
    )


def _serve(application: Any, listening: socket.socket, ending: threading.Event) -> None:
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            ending.set()  # nobody waits for the rest of an answer
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # that it broke off
            super().handle_exit(sig, frame)

    # A page that is open holds a connection, which is not waited for.
    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
    # uvicorn raises the signal again that has ended it: an exception, so that all is tidied up.
    previous = signal.signal(signal.SIGTERM, _exit)
    try:
        Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit(number: int, _: Any) -> None:
    sys.exit(128 + number)
