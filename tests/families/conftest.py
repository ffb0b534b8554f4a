"""Small bases of the families that follow IDEFICS."""

import copy

import pytest
from helpers import SUCCESSORS


@pytest.fixture(params=SUCCESSORS)
def family(request) -> str:
    return request.param


@pytest.fixture
def successor(bases, family) -> tuple:
    """A family's small base in 4 bits and its processor: copy the model before changing it."""
    return bases(family)


@pytest.fixture
def processor(successor):
    """With or without tokens for rows and columns, with or without a begin token; a copy."""
    return copy.deepcopy(successor[1])
