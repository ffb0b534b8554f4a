"""The server that the documentation shows for a merged model, run as it shows it."""

import contextlib
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers.utils import import_utils

import idefics_qlora as iq

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
QUESTION = "What is it?"


@pytest.mark.slow
@pytest.mark.skipif(not import_utils.is_serve_available(), reason="no transformers[serving] here")
def test_the_documented_server_answers_as_generate_does(cards, tmp_path, monkeypatch, capsys):
    """Training, merging, the command and the request of the page: what is answered over HTTP is
    what the library says, up to its end; so it is of two pictures and several turns, streamed."""
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (request,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^    (transformers serve .*)$", PAGE, re.MULTILINE)
    exec(compile(program, "serve.md", "exec"), {})
    cards[30]["image"].save("new.png")
    model, processor = iq.load_model(
        "served", quantize=False, compute_dtype=torch.float32, device="cpu"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    picture = iq.images.open_image("new.png")
    with served(command.replace("8000", port)):
        names: dict = {}
        capsys.readouterr()
        exec(compile(request.replace("8000", port), "serve.md", "exec"), names)
        prompt = [iq.Turn("user", [picture, QUESTION])]
        (expected,) = iq.generate(model, processor, [prompt], max_new_tokens=30)
        assert capsys.readouterr().out == expected + "\n"
        assert names["answer"].choices[0].finish_reason == "stop"
        image, text = names["content"]
        messages = [
            {"role": "user", "content": [image, image, text]},
            {"role": "assistant", "content": "A card."},
            {"role": "user", "content": "Sure?"},
        ]
        parts = names["client"].chat.completions.create(
            model="served", messages=messages, max_tokens=12, temperature=0.0, stream=True
        )
        said = "".join(part.choices[0].delta.content or "" for part in parts)
    turns = [iq.Turn("user", [picture, picture, QUESTION]), iq.Turn("assistant", "A card.")]
    turns.append(iq.Turn("user", "Sure?"))
    assert [said] == iq.generate(model, processor, [turns], max_new_tokens=12)


@contextlib.contextmanager
def served(command):
    """The server, once it listens."""
    words = shlex.split(command)
    assert words[0] == "transformers"
    start = "from transformers.cli.transformers import main; main()"
    env = {**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", start, *words[1:], "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as child:
        told = io.StringIO()
        try:
            for line in child.stdout:
                told.write(line)
                if "running on http" in line:
                    break
            else:
                pytest.fail(told.getvalue())
            reading = threading.Thread(target=child.stdout.read, daemon=True)
            reading.start()  # a full pipe would stop it
            yield
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            reading.join()
