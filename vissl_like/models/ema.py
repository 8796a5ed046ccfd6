"""An exponential moving average of a model's weights and statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vissl_like.config.schema_model import Ema as EmaOptions
from vissl_like.core.parallel import as_part, local, rows_like
from vissl_like.errors import WeightsError


class Ema:
    """average <- DECAY * average + (1 - DECAY) * weights, every UPDATE_ITER steps.

    During the first WARMUP share of training the average only copies. Counters (whole numbers) are always copied.
    """

    def __init__(self, model: nn.Module, *, options: EmaOptions, total_steps: int) -> None:
        self._decay, self._every = options.DECAY, options.UPDATE_ITER
        self._is_rising = options.RISING_DECAY
        self._warmup_steps = options.WARMUP * total_steps
        self._weights = dict(model.state_dict())
        # Of a sharded model the rows that lie here: the average of rows is the rows of the average.
        self._live = [local(tensor) for tensor in self._weights.values()]
        self._average = [tensor.detach().clone() for tensor in self._live]
        real = [i for i, tensor in enumerate(self._live) if tensor.is_floating_point()]
        whole = [i for i, tensor in enumerate(self._live) if not tensor.is_floating_point()]
        self._real = ([self._average[i] for i in real], [self._live[i] for i in real])
        self._whole = ([self._average[i] for i in whole], [self._live[i] for i in whole])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (counted from 1) was finished."""
        if step % self._every:
            return
        averages, weights = self._real
        if step <= self._warmup_steps:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1.0 - self._decay_at(step))
        _copy_all(*self._whole)

    def _decay_at(self, step: int) -> float:
        """DECAY, or what RISING_DECAY has reached of it."""
        if not self._is_rising:
            return self._decay
        return min(self._decay, 1 - (step // self._every) ** (-2 / 3))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's names."""
        pairs = zip(self._weights.items(), self._average)
        return {name: as_part(average, like=weight) for (name, weight), average in pairs}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these averages (whole ones)."""
        if set(state) != set(self._weights):
            odd = sorted(set(state) ^ set(self._weights))
            raise WeightsError(f"the saved averages do not fit the model; first difference: {odd[0]!r}.")
        for (name, weight), average in zip(self._weights.items(), self._average):
            average.copy_(rows_like(state[name], weight))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        with torch.no_grad():
            kept = [tensor.clone() for tensor in self._live]
            _copy_all(self._live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy_all(self._live, kept)


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.copy_(source)
