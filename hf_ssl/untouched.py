"""Work beside the training step (measuring, saving, publishing) that does not change what the next step computes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Within it work may draw from the global generators and change the ``models``' mode and attention implementation;
    afterwards generators (Python, NumPy, torch on the host and on the accelerator) and models are as before.

    Also a decorator: ``@untouched()``.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    configs: list[Any] = [module.config for module in modes if hasattr(module, "set_attn_implementation")]
    implementations = [config._attn_implementation for config in configs]
    put_back = _generators()
    try:
        yield
    finally:
        put_back()
        for module, training in modes.items():
            module.training = training  # one by one: train() would also wake submodules that were frozen on purpose
        for config, implementation in zip(configs, implementations):  # the whole before its parts, which may differ
            if config._attn_implementation != implementation:
                config._attn_implementation = implementation


def _generators() -> Callable[[], None]:
    """Notes the state of every global generator; the function returned restores all of them."""
    state, legacy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device: Any = _accelerator()
    places = range(device.device_count()) if device is not None else ()
    drawn = [device.get_rng_state(place) for place in places]

    def put_back() -> None:
        random.setstate(state)
        np.random.set_state(legacy)
        torch.set_rng_state(host)
        for place, before in zip(places, drawn):
            device.set_rng_state(before, place)

    return put_back


def _accelerator() -> Any:
    """The torch module of an accelerator that is in use and has generators, else None."""
    if not torch.accelerator.is_available():
        return None
    device = torch.get_device_module(torch.accelerator.current_accelerator())
    ready = getattr(device, "is_initialized", lambda: True)()
    return device if ready and hasattr(device, "set_rng_state") else None
