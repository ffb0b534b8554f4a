"""What several test files need besides fixtures."""

import torch

import idefics_qlora as iq


def config_of(folder, **changes):
    """Settings of a short fp32 run without evaluation."""
    settings = {
        "output_dir": folder,
        "max_steps": 4,
        "global_batch_size": 8,
        "precision": "fp32",
        "logging_steps": 1,
        "load_best_model_at_end": False,
        "num_workers": 0,
    }
    return iq.TrainConfig(**{**settings, **changes})


def same(a, b):
    """Whether two dictionaries of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
