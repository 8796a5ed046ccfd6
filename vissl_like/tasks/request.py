"""What a task is built from, beside its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vissl_like.analysis.class_metrics import TestFacts
from vissl_like.config.schema_data import Mix
from vissl_like.config.schema_model import Loss, Meters
from vissl_like.outputs.part_figures import Drawing


@dataclass(frozen=True)
class TaskRequest:
    """Sections of the configuration, and what the data sets say.

    `largest_label` of all samples, None for labels of another form. `image_size` (H, W) of the model's input.
    `drawing`: how part maps of tests get into the run folder; None: they do not.
    """

    loss: Loss
    meters: Meters
    mix: Mix = field(default_factory=Mix)
    num_classes: int | None = None
    class_names: Sequence[str] = ()
    largest_label: int | None = None
    facts: TestFacts = field(default_factory=TestFacts)
    image_size: tuple[int, int] = (0, 0)
    drawing: Drawing | None = None
