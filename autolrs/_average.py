"""A running average of a trial's weights, at which its loss is measured.

A rate is judged by what it will be worth once it has been annealed, and averaged iterates are near annealed ones: the
noise floor of a high constant rate, which the final decay removes, must not speak against it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainkit.autolrs._snapshot import local, reshard

# Polynomial averaging (Shamir and Zhang, 2013): the window grows with the trial, the first steps are forgotten.
POWER = 3.0


class WeightAverage:
    """Average over about the last quarter of the steps taken so far. One extra copy of parameters and float buffers.

    Args:
        module: module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        reshard([module])
        tensors: Iterable[Tensor] = [*module.parameters(), *module.buffers()]
        unique = {id(t): local(t) for t in tensors if t.is_floating_point()}
        self._live = list(unique.values())
        self._mean = [torch.empty_like(t) for t in self._live]
        self._steps = 0

    def reset(self) -> None:
        """Forgets everything: a new trial begins."""
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the current weights."""
        self._steps += 1
        if self._steps == 1:
            torch._foreach_copy_(self._mean, self._live)
        else:
            torch._foreach_lerp_(self._mean, self._live, (POWER + 1.0) / (self._steps + POWER))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module at its average, bit for bit itself afterwards; nothing before the first update."""
        if self._steps == 0:
            try:
                yield
            finally:
                reshard([self._module])
            return
        reshard([self._module])
        with torch.no_grad():
            saved = [t.clone() for t in self._live]
            torch._foreach_copy_(self._live, self._mean)
        try:
            yield
        finally:
            reshard([self._module])
            with torch.no_grad():
                torch._foreach_copy_(self._live, saved)
