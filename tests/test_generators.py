"""The caller's random generators are the caller's, whatever is done in between."""

import random

import numpy as np
import pytest
import torch
from helpers import config_of

import idefics_qlora as iq


def generators():
    """States of all global generators that a caller may draw from."""
    states = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
    return states + [state.tolist() for state in torch.cuda.get_rng_state_all()]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_leaves_the_generators_alone(lora, processor, examples, tmp_path, num_workers):
    """Also with dropout, crops, evaluations and captions, and when it goes on from a checkpoint."""
    before = generators()
    for steps in (1, 2):
        iq.train(
            lora,
            processor,
            examples,
            examples[:2],
            config=config_of(
                tmp_path,
                max_steps=steps,
                save_steps=1,
                eval_steps=1,
                eval_samples=1,
                eval_image_use=True,
                num_workers=num_workers,
            ),
        )
        assert generators() == before


class Broken(Exception):
    pass


def test_a_run_that_fails_leaves_the_generators_alone(lora, processor, examples, tmp_path):
    """An error in the middle is no reason for other numbers in what the caller does next."""
    before = generators()

    def stumble(_):
        raise Broken

    with pytest.raises(Broken):
        iq.train(lora, processor, examples, config=config_of(tmp_path), on_log=stumble)
    assert generators() == before
    with pytest.raises(ValueError, match="belongs to a run with other settings or rows"):
        iq.train(lora, processor, examples, config=config_of(tmp_path, seed=7))
    assert generators() == before
