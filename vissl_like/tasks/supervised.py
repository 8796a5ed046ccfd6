"""Classification of images against labels: given ones, pseudo-labels, and rotations made by a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vissl_like.analysis.meters import MeterGroup
from vissl_like.config.schema_model import Loss
from vissl_like.errors import DataError
from vissl_like.losses.classification import check_largest
from vissl_like.registry import resolve

#: Logits that are kept for the training meters before they are counted in one go.
_PENDING_NUMBERS = 1 << 20


class Supervised(nn.Module):
    """model(images) -> outputs of the heads; loss(outputs, labels); meters of outputs and labels.

    Batches hold data (B, 3, H, W) float on the model's device and label (B,) int64 or (B, K).
    """

    draws_in_test = False

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        train_meters: MeterGroup | None,
        test_meters: MeterGroup,
        largest_label: int | None = None,
    ) -> None:
        """`largest_label`: of all samples, compared with the heads' outputs before a GPU would stumble over it."""
        super().__init__()
        self.largest_label = largest_label
        self.model = model
        self.loss = loss_function(loss)
        self.train_meters, self.test_meters = train_meters, test_meters
        self._pending: list[tuple[list[Tensor], Tensor]] = []
        self._num_pending = 0

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The training step: {"loss": ()} and further scalars worth logging, each a mean over the batch."""
        try:
            outputs = self.predict(self.model, batch)
        except ValueError as error:
            raise _explained(error, rows=len(batch["label"])) from error
        if self.train_meters is not None:
            self._remember(outputs, batch["label"])
        return {"loss": self.loss(outputs, batch["label"])}

    training_step = forward

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        """The outputs (B, K) of the heads."""
        outputs = model(batch["data"])
        if self.largest_label is not None:
            for output in outputs:
                check_largest(self.largest_label, num_classes=output.shape[1])
        return outputs

    def score(self, outputs: Sequence[Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Count a batch of the test and return its mean loss, ()."""
        self.test_meters.update(outputs, batch["label"])
        return self.loss(outputs, batch["label"])

    def test_metrics(self, prefix: str) -> dict[str, float]:
        """What score() has counted on all ranks; the counts start again. A collective call."""
        values = self.test_meters.flatten(prefix)
        self.test_meters.reset()
        return values

    def train_metrics(self, prefix: str) -> dict[str, float]:
        """What the training steps have counted on all ranks; the counts start again. A collective call."""
        if self.train_meters is None:
            return {}
        self._count()
        values = self.train_meters.flatten(prefix)
        self.train_meters.reset()
        return values

    def running_state(self) -> list[dict[str, Any]]:
        """This rank's counts of the epoch so far, as tensors on the CPU."""
        if self.train_meters is None:
            return []
        self._count()
        return [_counts(meter) for meter, _ in self.train_meters.meters]

    def load_running_state(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Go on counting from the sum of these ranks' states."""
        if self.train_meters is None:
            return
        self.train_meters.reset()
        for state in states:
            for (meter, _), counts in zip(self.train_meters.meters, state):
                _add_counts(meter, counts)

    def _remember(self, outputs: Sequence[Tensor], target: Tensor) -> None:
        """Keep outputs for a while: counting many small batches at once costs a tenth of counting each."""
        self._pending.append(([output.detach() for output in outputs], target))
        self._num_pending += sum(output.numel() for output in outputs)
        if self._num_pending >= _PENDING_NUMBERS:
            self._count()

    def _count(self) -> None:
        if not self._pending or self.train_meters is None:
            return
        outputs = [torch.cat(parts) for parts in zip(*(outputs for outputs, _ in self._pending))]
        self.train_meters.update(outputs, torch.cat([target for _, target in self._pending]))
        self._pending, self._num_pending = [], 0


def _explained(error: ValueError, *, rows: int) -> Exception:
    """Batch normalisation over a single value, in words of the configuration; any other error as it is."""
    if "more than 1 value per channel" not in str(error):
        return error
    return DataError(
        f"a batch of {rows} image{'s' * (rows > 1)} is too small for batch normalisation ({error}). It is the last one of "
        "an epoch, or BATCHSIZE_PER_REPLICA is that small: set config.DATA.TRAIN.DROP_LAST=true, or change "
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA."
    )


def loss_function(options: Loss) -> Any:
    """loss(outputs, target) with the options of the section that has the loss's name."""
    function = resolve("loss", options.NAME, key="LOSS.NAME")
    section = getattr(options, options.NAME.upper(), None)
    arguments = {} if section is None else {key.lower(): value for key, value in section.model_dump().items()}
    return partial(function, **arguments)


def _counts(meter: Any) -> dict[str, Any]:
    """A meter's tensors, and its lists of arrays, as tensors on the CPU."""
    state: dict[str, Any] = {}
    for name, value in vars(meter).items():
        if isinstance(value, Tensor):
            state[name] = value.cpu().clone()
        elif isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
            state[name] = [torch.from_numpy(item) for item in value]
    return state


def _add_counts(meter: Any, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        held = getattr(meter, name)
        if isinstance(value, Tensor):
            setattr(meter, name, held + value.to(held.device))
        else:
            held.extend(item.numpy() for item in value)
