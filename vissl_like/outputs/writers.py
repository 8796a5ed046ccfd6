"""Where metrics go while a run is going on: metrics.jsonl, TensorBoard, Weights & Biases and the terminal.

Only the main rank makes a Writers. metrics.jsonl is the record that everything else can be made from again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vissl_like.errors import ConfigError
from vissl_like.files import refusals_explained, replacing, write_text
from vissl_like.outputs import console

if TYPE_CHECKING:
    from torch import nn

    from vissl_like.config.schema import Loggers, Run, TensorBoard, Wandb

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"

#: Keys of a record that say where it belongs; everything else is measured.
COORDINATES = ("kind", "step", "epoch")


class Writers:
    """Hands each record to metrics.jsonl and to the loggers that are switched on, and each step to the terminal."""

    def __init__(
        self,
        run_dir: Path,
        *,
        loggers: Loggers,
        run: Run,
        engine: str,
        log_frequency: int,
        total_steps: int | None,
        first_step: int = 1,
    ) -> None:
        """`first_step`: the first step that will be recorded (after resuming: the one after the checkpoint)."""
        self._sinks: list[JsonLines | TensorBoardSink | WandbSink] = [JsonLines(run_dir / METRICS_FILE)]
        if loggers.TENSORBOARD.ENABLED:
            self._sinks.append(TensorBoardSink(run_dir, options=loggers.TENSORBOARD, first_step=first_step))
        if loggers.WANDB.ENABLED:
            self._sinks.append(
                WandbSink(run_dir, options=loggers.WANDB, run=run, engine=engine, log_frequency=log_frequency)
            )
        self._progress = console.progress(
            run.PROGRESS, total=total_steps, title=run.NAME or run_dir.name, log_frequency=log_frequency
        )

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Record one line: kind, step, epoch and measured values. Numbers may be tensors or numpy scalars."""
        plain = {key: plain_value(value) for key, value in record.items()}
        for sink in self._sinks:
            sink.write(plain)

    def progress(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Step `step` is finished. `record`: the newest known epoch, loss, lr and images_per_s, as plain numbers."""
        self._progress.update(step, record)
        for sink in self._sinks:
            sink.stepped(step)

    def watch(self, model: nn.Module) -> None:
        """Follow gradients (W&B) or parameters (TensorBoard) of `model`, where an option asks for it."""
        for sink in self._sinks:
            sink.watch(model)

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        self._progress.close()
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """metrics.jsonl: one record a line, on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        with refusals_explained(self._path):
            self._file.write(json.dumps({key: _strict(value) for key, value in record.items()}) + "\n")

    def stepped(self, step: int) -> None:
        pass

    def watch(self, model: nn.Module) -> None:
        pass

    def close(self) -> None:
        with refusals_explained(self._path):  # a line that found no room is tried once more
            self._file.close()


class TensorBoardSink:
    """Scalars as <kind>/<key> over steps in tb_logs/, and histograms of parameters on request."""

    def __init__(self, run_dir: Path, *, options: TensorBoard, first_step: int) -> None:
        _need("tensorboard", "config.LOGGERS.TENSORBOARD.ENABLED=true")
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote after the checkpoint that is being continued.
        purge = first_step if first_step > 1 else None
        self._writer: Any = SummaryWriter(str(run_dir / "tb_logs"), purge_step=purge)
        self._every = options.LOG_PARAMS_EVERY_N_ITERS if options.LOG_PARAMS else 0
        self._model: nn.Module | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in measured(record).items():
            self._writer.add_scalar(key, value, global_step=record.get("step"))

    def stepped(self, step: int) -> None:
        if not self._every or self._model is None or step % self._every:
            return
        for name, parameter in self._model.named_parameters():
            self._writer.add_histogram(f"parameters/{name}", parameter.detach().float().cpu(), global_step=step)

    def watch(self, model: nn.Module) -> None:
        self._model = model

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run. Its id lies in the run folder, so that a continued run continues it there too."""

    def __init__(self, run_dir: Path, *, options: Wandb, run: Run, engine: str, log_frequency: int) -> None:
        _need("wandb", "config.LOGGERS.WANDB.ENABLED=true")
        import wandb

        self._watches = options.WATCH_GRADIENTS
        self._log_frequency = log_frequency
        # Without `mode` W&B obeys its own variable WANDB_MODE, and goes online if that is not set.
        mode = None if options.MODE == "online" else options.MODE
        try:
            self._run = wandb.init(
                project=options.PROJECT,
                entity=options.ENTITY or None,
                group=options.GROUP or None,
                job_type=options.JOB_TYPE or engine,
                name=options.NAME or run.NAME or run_dir.name,
                id=wandb_id(run_dir, given=options.RESUME_ID),
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                dir=str(run_dir),
                config=_resolved_config(run_dir),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"config.LOGGERS.WANDB.ENABLED=true: Weights & Biases did not start ({error}). Run `wandb login`, or "
                "set config.LOGGERS.WANDB.MODE=offline and upload later with `wandb sync`."
            ) from error
        # Steps are a metric of their own: W&B drops records whose built-in step went back, as it does on resuming.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        where = {key: record[key] for key in ("step", "epoch") if key in record}
        self._run.log({**measured(record), **where})

    def stepped(self, step: int) -> None:
        pass

    def watch(self, model: nn.Module) -> None:
        if self._watches:
            self._run.watch(model, log="gradients", log_freq=self._log_frequency)

    def close(self) -> None:
        self._run.finish()


def rewind(run_dir: Path, step: int) -> int:
    """Drop what metrics.jsonl holds beyond `step`, and a torn last line. Returns the number of dropped lines.

    Called before a run goes on from the checkpoint of `step`, so that no step is recorded twice.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8")
    kept, dropped = [], 0
    for line in text.splitlines():
        record = _parsed(line)
        if record is None or record.get("step", 0) > step:
            dropped += 1
        else:
            kept.append(line + "\n")
    whole = "".join(kept)
    if whole != text:
        with replacing(path) as stream:
            stream.write(whole.encode())
    return dropped


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of metrics.jsonl, in order; numbers that JSON cannot write are floats again."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        records = [_parsed(line) for line in file]
    return [{key: _number(value) for key, value in record.items()} for record in records if record is not None]


def wandb_id(run_dir: Path, *, given: str = "") -> str:
    """The id of this run folder's W&B run: the given one, else the one on file, else a new one; kept on file."""
    path = run_dir / WANDB_ID_FILE
    known = path.read_text().strip() if path.exists() else ""
    chosen = given or known or uuid.uuid4().hex[:8]
    if chosen != known:
        write_text(path, chosen + "\n")
    return chosen


def measured(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that are not coordinates, as {"<kind>/<key>": number}. Lists and texts stay out."""
    kind = record.get("kind", "train")
    return {
        f"{kind}/{key}": value
        for key, value in record.items()
        if key not in COORDINATES and isinstance(value, int | float)
    }


def plain_value(value: Any) -> Any:
    """Tensors and numpy values as Python numbers and lists; everything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as the texts "nan", "inf" and "-inf"."""
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _need(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package!r}, which is not installed: pip install {package}")


def _resolved_config(run_dir: Path) -> dict[str, Any]:
    import yaml

    path = run_dir / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}
