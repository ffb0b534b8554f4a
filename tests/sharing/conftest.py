"""What tests of what is given away share: pictures, a run, and a Hub on loopback."""

import copy
import shutil

import huggingface_hub.utils._http as client
import pytest
from helpers import config_of
from hub import TOKEN, Hub
from huggingface_hub import constants

import idefics_qlora as iq


@pytest.fixture
def hub(monkeypatch):
    """The Hub for the client in this process; it waits for nothing."""
    server = Hub()
    for name, value in {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    client.close_session()
    yield server
    client.close_session()
    server.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, loaded, cards):
    """A run with an evaluation, samples and two checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = config_of(
        folder,
        max_steps=2, eval_steps=1, save_steps=1, eval_samples=2, learning_rate=0.01,
        load_best_model_at_end=True,
    )  # fmt: skip
    model = iq.add_lora(copy.deepcopy(loaded[0]))
    iq.train(model, loaded[1], cards[:8], cards[8:12], config=config)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def pictures(cards, tmp_path):
    """Two pictures as files, one of them a JPEG."""
    files = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for card, file in zip(cards[30:], files, strict=False):
        card["image"].save(file)
    return files
