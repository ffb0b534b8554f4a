"""Fixtures every test may use; nothing here is written outside pytest's temporary folders."""

from __future__ import annotations

import os

# Before torch and transformers are imported: no network, no threads fighting over two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import idefics_qlora as iq

QUESTION = "Question: What's on the picture? Answer:"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--kills 50`` is the long form of the tests that kill processes."""
    parser.addoption("--kills", type=int, default=5, help="how often test_faults.py kills a run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests where there is no GPU, or where several processes would share it."""
    if not torch.cuda.is_available():
        reason = "no CUDA GPU on this machine"
    elif "PYTEST_XDIST_WORKER" in os.environ:
        reason = "needs the GPU for itself: .venv/bin/pytest -m gpu"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """A test leaves the environment and PyTorch's global switches as it found them."""
    before = global_state()
    yield
    assert global_state() == before


def global_state() -> tuple:
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    switches = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    return environment, switches


@pytest.fixture(autouse=True)
def own_cache(nothing_leaks: None, tmp_path: Path) -> Iterator[None]:
    """Downloaded pictures are kept in the test's own folder, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDEFICS_QLORA_CACHE", str(tmp_path / "cache"))
        yield


@pytest.fixture
def picture() -> Image.Image:
    """A picture of 120 x 160 pixels with a gradient in every direction."""
    red = np.linspace(0, 255, 120)[None, :].repeat(160, 0)
    green = np.linspace(0, 255, 160)[:, None].repeat(120, 1)
    pixels = np.stack([red, green, 255 - red], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple]:
    """A family's tiny base in 4 bits and its processor, loaded once: copy the base."""
    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def load(family: str) -> tuple:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("IDEFICS_QLORA_CACHE", str(folder))
            return iq.tiny.load_model(family=family, device="cpu")

    return load


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    """Whose base and processor a test gets: IDEFICS', or each one's (``helpers.every_family``)."""
    return getattr(request, "param", "idefics")


@pytest.fixture(scope="session")
def loaded(bases: Callable[[str], tuple]) -> tuple:
    """IDEFICS' base and processor, for fixtures that are made once: copy the base."""
    return bases("idefics")


@pytest.fixture
def base(bases: Callable[[str], tuple], family: str):
    """The tiny base in 4 bits; a copy, so that a test may do with it what it likes."""
    return copy.deepcopy(bases(family)[0])


@pytest.fixture
def processor(bases: Callable[[str], tuple], family: str):
    """The tiny base's processor."""
    return bases(family)[1]


@pytest.fixture(scope="session")
def instruct_processor(loaded, tmp_path_factory: pytest.TempPathFactory):
    """The tiny base's processor with ``<end_of_utterance>``, as the -instruct bases have it.

    The token takes the place of the vocabulary's last one, so that the model embeds it.
    """
    folder = tmp_path_factory.mktemp("instruct")
    loaded[1].save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if "".join(pair) != last]
    end = {**tokenizer["added_tokens"][-1], "content": "<end_of_utterance>"}
    end["id"] = vocabulary.pop(last)
    tokenizer["added_tokens"].append(end)
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["extra_special_tokens"].append("<end_of_utterance>")
    file.write_text(json.dumps(config))
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def lora(base):
    """The tiny base with the recipe's fresh adapters."""
    return iq.add_lora(base)


@pytest.fixture(scope="session")
def cards() -> list[dict]:
    """Forty training cards."""
    return iq.tiny.creature_cards(40, seed=0)


@pytest.fixture(scope="session")
def examples(cards: list[dict]) -> list[iq.Example]:
    """The cards as examples, their texts of very different lengths."""
    return [
        iq.Example([card["image"], QUESTION], f" This is {card['name']}." + " It is." * (i % 7))
        for i, card in enumerate(cards)
    ]


@pytest.fixture(scope="session")
def mixed(cards: list[dict], examples: list[iq.Example]) -> list[iq.Example]:
    """Pictures of several shapes, two in a row, texts without, and a dialogue."""
    wide = cards[1]["image"].resize((200, 60))
    turns = [iq.Turn("user", [wide, "Who?"]), iq.Turn("assistant", "Nobody.", is_target=True)]
    return [
        *examples[:9],
        iq.Example([wide, examples[3].prompt[0], "Which is wider?"], " The first."),
        iq.Example(["Is there a picture?"], " No."),
        iq.Example([*turns, iq.Turn("user", "Sure?")], "Yes."),
    ]
