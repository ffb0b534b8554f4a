"""AdamW over single parameters, as version 0.1 had it: what flat memory must equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from idefics_qlora.config import TrainConfig


def make_optimizer(parameters: Iterable[Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the adapter: paged with 8-bit states, or PyTorch's own.

    bitsandbytes keeps states of tensors under 4,096 elements in 32 bits, and pages only states
    from 100,000 elements on; on a CPU nothing is paged.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(list(parameters), **settings)
    import bitsandbytes as bnb  # loads its native library

    parameters = list(parameters)
    # Only a GPU has something to page to; on a CPU the paged class would just warn of that.
    on_gpu = parameters[0].device.type == "cuda"
    kind = bnb.optim.PagedAdamW8bit if on_gpu else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **settings)
    return optimizer


def allocate_states(optimizer: Any) -> None:
    """Make all states now, as the first step would make them.

    Left to the step they are made parameter by parameter, and running out of memory between two of
    them leaves half an update.

    Args:
        optimizer: As :func:`make_optimizer` gave it; states that are there, loaded ones, stay.
    """
    of_torch = isinstance(optimizer, torch.optim.AdamW)
    if not of_torch:
        optimizer.to_gpu()  # loaded states, otherwise moved in the first step
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if optimizer.state[parameter]:
                continue
            if of_torch:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
            else:
                optimizer.init_state(group, parameter, g, i)


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's state keyed by parameter name instead of by position.

    Args:
        optimizer: As :func:`make_optimizer` gave it.
        names: Name of every parameter it holds.

    Returns:
        Tensors as ``{"<parameter>::<key>": tensor}``, and what is no tensor as
        ``{parameter: {key: value}}``.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}::{key}"] = value.detach()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: dict[Parameter, str],
    tensors: dict[str, Tensor],
    scalars: dict[str, dict[str, Any]],
    complete: bool = False,
) -> None:
    """Put a state from :func:`optimizer_state` back.

    Args:
        optimizer: As :func:`make_optimizer` gave it.
        names: Name of every parameter it holds.
        tensors: As they were returned.
        scalars: As they were returned.
        complete: Whether every parameter must have a state. Before :func:`allocate_states` those
            without a gradient had none.

    Raises:
        ValueError: If a state is missing, of another parameter, or not what the optimizer makes.
    """
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars.items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("::")
        by_name.setdefault(name, {})[entry] = tensor
    known = set(names.values())
    if by_name.keys() - known:
        raise ValueError(
            f"the optimizer state belongs to other parameters: {sorted(by_name.keys() - known)[:3]}"
        )
    if complete and (missing := sorted(known - by_name.keys())):
        raise ValueError(f"the optimizer has no state of {missing[:3]}")
    for parameter, name in names.items():
        if name in by_name:
            _check_state(name, parameter, by_name[name])
    groups = optimizer.state_dict()["param_groups"]
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: by_name[names[p]] for i, p in enumerate(order) if names[p] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _page_again(optimizer)


def _check_state(name: str, parameter: Parameter, state: dict[str, Any]) -> None:
    of_torch = "exp_avg" in state
    moments = ("exp_avg", "exp_avg_sq") if of_torch else ("state1", "state2")
    quantised = getattr(state.get("state1"), "dtype", None) == torch.uint8
    maps = ("qmap1", "qmap2", "absmax1", "absmax2") if quantised else ()
    if missing := {"step", *moments, *maps} - state.keys():
        raise ValueError(f"the optimizer's state of {name} lacks {sorted(missing)}")
    if any(state[key].shape != parameter.shape for key in moments):
        raise ValueError(f"the optimizer's state of {name} has another shape")


def _page_again(optimizer: Any) -> None:
    """Move loaded states back to paged memory: ``load_state_dict`` leaves them on the GPU."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            if key in state and parameter.device.type == "cuda":
                loaded = state[key]
                state[key] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                torch.cuda.synchronize()  # sync: a paged buffer is cleared asynchronously
                state[key].copy_(loaded)
