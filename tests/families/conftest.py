"""Small bases of the families that follow IDEFICS."""

import copy

import pytest

import idefics_qlora as iq


@pytest.fixture(scope="session", params=["smolvlm", "idefics3"])
def successor(request, tmp_path_factory) -> tuple:
    """A family's small base in 4 bits and its processor: copy the model before changing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDEFICS_QLORA_CACHE", str(tmp_path_factory.mktemp("bases")))
        return iq.tiny.load_model(family=request.param, device="cpu")


@pytest.fixture
def base(successor):
    return copy.deepcopy(successor[0])


@pytest.fixture
def processor(successor):
    """With or without tokens for rows and columns, with or without a begin token."""
    return copy.deepcopy(successor[1])
