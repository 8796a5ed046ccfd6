"""The training loop. Each step passes five places, in this order, all of them in run_epoch():

    prepare             seed what the model draws, set the rates
    forward_backward    the micro-batches of the step; a loss that is not finite ends the run before it does harm
    clip                gradients
    update              weights, then their average
    keep_books          log, save, notice a request to stop

Everything random follows from (seed, step), and everything else that outlives a step is in the checkpoint: a run that
is interrupted anywhere and started again ends in the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vissl_like.config.schema import Profile
from vissl_like.config.schema_model import GradClip
from vissl_like.core import checkpoint, distributed, parallel, rng, signals
from vissl_like.core.evaluation import Arithmetic, Batch, Task, counted_rows, evaluate
from vissl_like.core.guard import FiniteGuard, refuse_bad_weights
from vissl_like.core.loss_sum import LossSum
from vissl_like.core.profile import make_profile
from vissl_like.core.saving import Saver
from vissl_like.errors import ConfigError, DataError, Stopped
from vissl_like.models.ema import Ema
from vissl_like.optim.clipping import clip_gradients
from vissl_like.optim.groups import Group, load_state_by_name, rates_of_roles, set_rates, state_by_name
from vissl_like.optim.schedules import Rates, StepRates
from vissl_like.registry import suggest

#: Prefixes of what is measured under the weights, and under their average.
TESTS = ("test", "test_ema")


class Record(Protocol):
    """Where metrics go (outputs/writers.py on the main rank)."""

    def metrics(self, record: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, record: Mapping[str, Any] | None = None) -> None: ...


@dataclass(frozen=True)
class Options:
    """What the loop needs to know, resolved from the configuration and the plan."""

    seed: int
    num_epochs: int
    steps_per_epoch: int
    accumulate: int = 1
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    clip: GradClip = field(default_factory=GradClip)
    check_nan: bool = True
    log_every: int = 10
    test_every: int = 1
    save_every_epochs: int = 1
    save_every_steps: int = 0
    keep: int = 2
    save_async: bool = True
    best_metric: str = ""
    profile: Profile = field(default_factory=Profile)

    @property
    def total_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Feed:
    """The images. Batches come from the host; `to_input` is what the transforms leave to the device.

    train(epoch, first_step, in_process) yields `accumulate` micro-batches per step; in_process: without loader
    processes. test() yields this rank's batches of the test split.
    `identity`: what the order of samples depends on; a checkpoint with another one cannot be continued. `pass_ended` is
    called on every rank after each pass over a split.
    """

    train: Callable[[int, int, bool], Iterator[Batch]]
    to_input: Callable[[Tensor], Tensor]
    test: Callable[[], Iterator[Batch]] | None = None
    to_test_input: Callable[[Tensor], Tensor] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    pass_ended: Callable[[], None] = lambda: None


@dataclass
class Window:
    """What was measured since the last log line."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    rows: int = 0


class Training:
    """A model on its way through the epochs: resume() if there is a checkpoint, then run()."""

    def __init__(
        self,
        *,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Group],
        rates: Rates,
        feed: Feed,
        options: Options,
        run_dir: Path,
        record: Record,
        ema: Ema | None = None,
    ) -> None:
        """`task` (see evaluation.Task) may be wrapped by parallel.wrap_for_gradients()."""
        self.wrapped = task
        self.task: Task = parallel.unwrap(task)  # type: ignore[assignment]
        self.model = self.task.model
        self.optimizer, self.groups, self.rates, self.ema = optimizer, groups, rates, ema
        self.feed, self.options, self.run_dir, self.record = feed, options, run_dir, record
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        device = distributed.current().device
        self.scaler = torch.amp.GradScaler(device.type) if options.arithmetic.precision == "fp16" else None
        self.guard = FiniteGuard(run_dir) if options.check_nan else None
        self.saver = Saver(run_dir, keep=options.keep, in_background=options.save_async)
        self.profile = make_profile(options.profile, run_dir)
        # What a checkpoint holds beside weights and optimizer:
        self.step = 0
        self.test_due = False
        self.results: dict[str, Any] = {}
        self.loss_sum = LossSum()
        self.rows: float = 0  # as the loss counts them
        # What it does not need to hold:
        self.saved_step = -1
        self.known_tests: dict[int, dict[str, float]] = {}
        self.window = Window()
        self.batches: Iterator[Batch] = iter(())
        self.line: dict[str, Tensor] | None = None
        self.current_rates: StepRates | None = None
        self.answer: Callable[[], bool] = lambda: False
        self.stop = signals.StopRequest()

    # ------------------------------------------------------------------------------------------------------ the course
    def run(self) -> dict[str, Any]:
        """Train from the present state to the end; returns the final metrics. Raises Stopped after a signal."""
        self.refuse_unknown_best()
        with signals.listen() as self.stop, contextlib.closing(self.saver), contextlib.closing(self.profile):
            if self.test_due:
                self.run_test()
            while self.step < self.options.total_steps:
                self.run_epoch()
            if self.saved_step < 0:  # a training of no steps is tested and leaves its weights, too
                self.test_due = self.feed.test is not None
                self.save()
                if self.test_due:
                    self.run_test()
            self.answer()  # every rank has asked once more than it has heard
            self.saver.finish()
        return dict(self.results)

    def run_epoch(self) -> None:
        """The rest of the current epoch: its steps, then its books, a save and a test where they are due."""
        epoch, first = divmod(self.step, self.options.steps_per_epoch)
        self.batches = self.feed.train(epoch, first, False)
        self.wrapped.train()
        self.window = Window()
        for _ in range(first, self.options.steps_per_epoch):
            self.profile.begin("data wait")
            micro_batches = self.fetch()
            self.profile.begin("other")
            self.prepare()
            self.forward_backward(micro_batches)
            self.profile.begin("optimizer")
            norm = self.clip()
            self.update()
            self.profile.begin("books")
            self.keep_books(norm)
            self.profile.end_step(self.step, micro_batches)
        self.end_epoch()

    def fetch(self) -> list[Batch]:
        """The micro-batches of a step. They come before the seeds: loading must not disturb what the model draws."""
        began = time.perf_counter()
        try:
            micro_batches = [next(self.batches) for _ in range(self.options.accumulate)]
        except (RuntimeError, DataError):
            if not signals.comes_soon(lambda: self.stop.requested):
                raise
            # A signal to the whole process group has ended the loader's processes; the ranks still have to agree on the
            # step after which they stop.
            self.batches = self.feed.train(*divmod(self.step, self.options.steps_per_epoch), True)
            micro_batches = [next(self.batches) for _ in range(self.options.accumulate)]
        self.window.waited += time.perf_counter() - began
        return micro_batches

    # ------------------------------------------------------------------------------------------------- the five places
    def prepare(self) -> None:
        """Seed what the model draws in this step and set the rates."""
        rng.seed_step(self.options.seed, self.step, distributed.current().rank)
        rates = self.rates.at(self.step)
        if rates != self.current_rates:
            self.current_rates = rates
            set_rates(self.optimizer, self.groups, rates)
        self.line = {} if self.is_logged(self.step + 1) else None

    def forward_backward(self, micro_batches: list[Batch]) -> None:
        """Add up the gradients of the step's mean loss over its micro-batches."""
        losses: list[Tensor] = []
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            self.profile.begin("transfer")
            inputs = self.options.arithmetic.to_device(batch, self.feed.to_input)
            self.profile.begin("forward")
            with contextlib.nullcontext() if is_last else parallel.without_exchange(self.wrapped):
                with self.options.arithmetic.autocast():
                    values = self.wrapped(inputs)
                self.profile.begin("backward")
                losses.append(values["loss"].detach())
                if is_last and self.guard is not None:
                    self.guard.look(losses)
                share = float(batch["weight"]) / len(micro_batches)  # `weight` stays on the host
                loss = values["loss"] if share == 1.0 else values["loss"] * share
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.profile.begin("books")
            self.count(values, share=share, batch=batch)
        if self.guard is not None:
            epoch = self.step // self.options.steps_per_epoch
            where = {"step": self.step + 1, "epoch": epoch, "seed": self.options.seed}
            self.guard.check(micro_batches, self.model, where=where)

    def clip(self) -> Tensor | None:
        """Clip the gradients; returns their norm before, on the device."""
        if not self.options.clip.USE_GRAD_CLIP:
            return None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.options.clip)

    def update(self) -> None:
        """Change the weights, then their average. The step is finished."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        for parameter in self.parameters:  # as zero_grad() does, for a tenth of its time
            parameter.grad = None
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)

    def keep_books(self, norm: Tensor | None) -> None:
        """Log every log_every steps, save every save_every_steps, stop if any rank was asked to."""
        options = self.options
        line = None if self.line is None else self.log_step(self.line, norm)
        self.record.progress(self.step, line)
        ends_epoch = self.step % options.steps_per_epoch == 0
        if options.save_every_steps and self.step % options.save_every_steps == 0 and not ends_epoch:
            self.save()
        if self.should_stop():
            if ends_epoch:
                self.close_epoch()
            self.save()
            raise self.stopped()

    # ------------------------------------------------------------------------------------------------------- the books
    def count(self, values: Mapping[str, Tensor], *, share: float, batch: Batch) -> None:
        """Add a micro-batch to the running sums, without waiting for the device."""
        counted = counted_rows(batch)
        self.loss_sum.add(values["loss"], rows=counted)
        self.rows += counted
        self.window.rows += len(batch["index"])
        if self.line is not None:
            for name, value in values.items():
                part = value.detach().double() * share
                self.line[name] = self.line[name] + part if name in self.line else part

    def log_step(self, values: dict[str, Tensor], norm: Tensor | None) -> dict[str, Any]:
        """Write the line of this step, means over all ranks: the only moment at which values come from the device."""
        if norm is not None:
            values["grad_norm"] = norm.double()
        size = distributed.current().size
        local = torch.stack(list(values.values())).cpu() / size
        seconds = time.perf_counter() - self.window.began
        speed = torch.tensor([self.window.rows / seconds, self.window.waited / seconds / size], dtype=torch.float64)
        *means, images_per_s, data_wait_share = distributed.all_reduce_sum(torch.cat([local, speed])).tolist()
        lr, lr_head, weight_decay, floor = self.current_rates or StepRates(0.0, 0.0, None)
        lr, lr_head = lr + floor, lr_head + floor
        line: dict[str, Any] = {"kind": "train", **self.place(), **dict(zip(values, means)), "lr": lr}
        if lr_head != lr:
            line["lr_head"] = lr_head
        line |= rates_of_roles(self.optimizer, self.groups)
        if weight_decay is not None:
            line["weight_decay"] = weight_decay
        line |= {"images_per_s": images_per_s, "data_wait_share": data_wait_share}
        self.record.metrics(line)
        self.window = Window()
        return line

    def place(self) -> dict[str, Any]:
        """Where the training is: finished steps, and epochs with their fraction."""
        return {"step": self.step, "epoch": self.step / max(1, self.options.steps_per_epoch)}

    def is_logged(self, step: int) -> bool:
        return step % self.options.log_every == 0 or step in (1, self.options.total_steps)

    def close_epoch(self) -> None:
        """Write the epoch's means and start new sums."""
        local = torch.tensor([self.loss_sum.value(), self.rows], dtype=torch.float64)
        loss_sum, rows = distributed.all_reduce_sum(local).tolist()
        means = {"train_loss": loss_sum / rows if rows else 0.0, **self.task.train_metrics("train")}
        epoch = self.step // self.options.steps_per_epoch
        self.record.metrics({"kind": "train_epoch", "step": self.step, "epoch": epoch, **means})
        self.results |= means
        self.loss_sum.start_at(0.0)
        self.rows = 0
        self.feed.pass_ended()
        is_last = self.step >= self.options.total_steps
        self.test_due = self.feed.test is not None and (epoch % self.options.test_every == 0 or is_last)

    def end_epoch(self) -> None:
        """Books, save and test of a finished epoch. The save comes first: a long test is no reason to lose an epoch."""
        self.close_epoch()
        options = self.options
        epoch = self.step // options.steps_per_epoch
        every = options.save_every_epochs
        if self.step >= options.total_steps or (every and epoch % every == 0):
            self.save()
        if self.test_due:
            self.run_test()

    def should_stop(self) -> bool:
        """Whether any rank got a signal; all ranks get the same answer at the same step.

        With several ranks the answer is that to the question of the step before, so nobody waits for it.
        """
        if distributed.current().size == 1:
            return self.stop.requested
        answer, self.answer = self.answer, distributed.start_any(self.stop.requested)
        return answer()

    def stopped(self) -> Stopped:
        """The end after a signal, once everything is on the disk."""
        self.saver.finish()
        return signals.stopped(
            f"stopped by {self.stop.name or 'a signal to another process'} after step {self.step} of "
            f"{self.options.total_steps}; saved in {self.run_dir}. The same command goes on from there."
        )

    # ---------------------------------------------------------------------------------------------------------- tests
    def run_test(self) -> None:
        """Test the weights (and their average), note the results, and point `best` at the best so far."""
        metrics = self.known_tests.pop(self.step, None)
        if metrics is None:
            metrics = self.measure()
            if metrics is None:
                self.save()
                raise self.stopped()
            epoch = self.step // max(1, self.options.steps_per_epoch)
            self.record.metrics({"kind": "test", "step": self.step, "epoch": epoch, **metrics})
        self.results |= metrics
        self.test_due = False
        self.note_best(metrics)

    def measure(self) -> dict[str, float] | None:
        """The metrics of the test split under the weights and under their average; None after a signal."""
        metrics = self.measure_as(TESTS[0], epoch=self.step // max(1, self.options.steps_per_epoch))
        if metrics is not None and self.ema is not None:
            with self.ema.in_place():
                averaged = self.measure_as(TESTS[1])
            metrics = None if averaged is None else metrics | averaged
        self.feed.pass_ended()
        return metrics

    def measure_as(self, prefix: str, *, epoch: int | None = None) -> dict[str, float] | None:
        assert self.feed.test is not None
        return evaluate(
            self.task,
            self.feed.test(),
            to_input=self.feed.to_test_input or self.feed.to_input,
            arithmetic=self.options.arithmetic,
            seed=self.options.seed,
            prefix=prefix,
            epoch=epoch,
            interrupted=lambda: self.stop.requested,
        )

    def refuse_unknown_best(self) -> None:
        """A misspelt BEST_METRIC is an error before the first epoch, not after it."""
        name = self.options.best_metric
        if not name or self.feed.test is None:
            return
        known = [key for prefix in TESTS[: 1 + (self.ema is not None)] for key in self.names_of_test(prefix)]
        if name not in known:
            raise ConfigError(
                f"config.CHECKPOINT.BEST_METRIC={name!r}: the test measures {', '.join(known)}{suggest(name, known) or '.'}"
            )

    def names_of_test(self, prefix: str) -> list[str]:
        """Keys of what a test under this prefix measures."""
        return [f"{prefix}_loss", *self.task.test_metrics(prefix)]

    def note_best(self, metrics: Mapping[str, float]) -> None:
        """Keep the best value of BEST_METRIC, and let `best` point at the weights that gave it."""
        name = self.options.best_metric or next((key for key in metrics if not key.endswith("_loss")), "test_loss")
        value, best = metrics[name], self.results.get(f"best_{name}")
        sign = -1 if name.endswith("_loss") else 1
        if best is not None and not math.isnan(best) and not sign * value > sign * best:
            return
        self.results |= {f"best_{name}": value, "best_step": self.step}
        if self.saved_step != self.step:
            self.save()
        self.saver.mark_best(self.step)

    # ----------------------------------------------------------------------------------------------- save and go on
    def save(self) -> None:
        """Save everything that the rest of the training depends on."""
        if self.saved_step == self.step:
            return
        if self.guard is not None:
            refuse_bad_weights(self.model, step=self.step)
        mine = {"loss_sum": self.loss_sum.value(), "rows": self.rows, "running": self.task.running_state()}
        state = {
            "step": self.step,
            "test_due": self.test_due,
            "results": self.results,
            "identity": dict(self.feed.identity),
            "ranks": distributed.all_gather_object(mine),
            "optimizer": state_by_name(self.optimizer, self.groups),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        self.saver.save(
            step=self.step,
            model_state=self.model.state_dict(),
            training_state=state,
            ema_state=None if self.ema is None else self.ema.state_dict(),
        )
        self.saved_step = self.step
        self.window = Window()

    def resume(self, saved: checkpoint.Saved) -> None:
        """Take over a checkpoint's state."""
        weights = {name: weight for group in self.groups for name, weight in zip(group.names, group.parameters)}
        state = saved.training_state(weights)
        self.refuse_other_order(state["identity"], saved)
        saved.load_into(self.model)
        load_state_by_name(self.optimizer, self.groups, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(saved.ema_state() or saved.model_state())
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.test_due, self.results = state["step"], state["test_due"], state["results"]
        self.saved_step = self.step
        self.take_running_sums(state["ranks"])

    def take_running_sums(self, ranks: list[dict[str, Any]]) -> None:
        """Each rank goes on with its own sums; if their number has changed, rank 0 with all of them."""
        world = distributed.current()
        if len(ranks) == world.size:
            mine = [ranks[world.rank]]
        else:
            mine = ranks if world.rank == 0 else []
        self.loss_sum.start_at(sum(part["loss_sum"] for part in mine))
        self.rows = sum(part["rows"] for part in mine)
        self.task.load_running_state([part["running"] for part in mine])

    def refuse_other_order(self, saved: Mapping[str, Any], where: checkpoint.Saved) -> None:
        """A checkpoint of step s belongs to the first s steps of one certain order of samples."""
        now = self.feed.identity
        differing = [f"{key} was {saved.get(key)}, is {value}" for key, value in now.items() if saved.get(key) != value]
        if differing:
            raise ConfigError(
                f"{where.path}: cannot go on from here, the order of the images would be another one: "
                f"{'; '.join(differing)}. With another number of processes keep the global batch "
                "(config.DATA.TRAIN.BATCHSIZE_PER_REPLICA, config.OPTIMIZER.ACCUMULATE_STEPS), or set "
                "config.RUN.OVERWRITE=true to start anew."
            )
