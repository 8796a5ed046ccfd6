"""RUN.DRY_RUN=true: everything that can be known before a run starts. Starts nothing and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vissl_like.config.components import load_plugins
from vissl_like.config.plan import Plan, table
from vissl_like.config.rules import used_splits
from vissl_like.config.saved import plain
from vissl_like.config.schema import Config, Job, defaults
from vissl_like.config.stages import changed, stage_jobs
from vissl_like.errors import ConfigError
from vissl_like.launch import folder, slurm
from vissl_like.launch.inputs import check_inputs
from vissl_like.launch.local import plan_for
from vissl_like.launch.machine import processes_for

if TYPE_CHECKING:
    from torch import nn

    from vissl_like.data.images import ImageDataset

#: Bytes of optimizer state per trained parameter (fp32).
_OPTIMIZER_BYTES = {"sgd": 4, "lars": 4, "rmsprop": 8, "adam": 8, "adamw": 8}
_MODEL_ENGINES = ("train", "extract_features", "extract_label_predictions", "evaluate", "cluster_features")


def dry_run(job: Job, run_dir: Path, info: folder.LaunchInfo) -> str:
    """The report of a dry run. Raises the same errors as a start would."""
    load_plugins(job.config.PLUGINS)
    job = folder.with_run_dir(job, run_dir)
    files = check_inputs(job)
    is_batch_job = slurm.is_wanted(job.config)
    processes = slurm.requested(job.config) if is_batch_job else processes_for(job.config)
    sets = {split: _open(job, split) for split in _splits_to_open(job)}
    num_train = len(sets["TRAIN"]) if job.engine_name == "train" and "TRAIN" in sets else None
    job, plan = plan_for(job, processes, num_train=num_train)
    parts = [
        (
            "Run",
            [f"engine {job.engine_name}, recipe {info.recipe or '(none)'}", f"folder {run_dir}: {_state(job, plan)}"],
        ),
        ("Configuration (what differs from the defaults; config.VERBOSE=true prints all)", _configuration(job)),
        ("Inferred values", [*table(plan).splitlines(), *(f"warning: {text}" for text in plan.warnings)]),
        ("Files", [f"found {path}" for path in files] or ["none are named in the configuration"]),
    ]
    if is_batch_job:
        parts.append(("Batch job", slurm.batch_text(job, run_dir).splitlines()))
    if job.engine_name == "pipeline":
        parts.append(("Stages", list(_stages(job, run_dir))))
    if sets:
        parts.append(("Data", [_describe_split(split, dataset) for split, dataset in sets.items()]))
    if sets and job.engine_name in _MODEL_ENGINES:
        parts += _model_parts(job, plan, sets)
    text = "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts)
    return f"{text}\n\nDry run: nothing was started, nothing was written."


def _splits_to_open(job: Job) -> list[str]:
    config = job.config
    reads_features = (job.engine_name == "evaluate" and config.EVALUATE.FEATURES_PATH) or (
        job.engine_name == "cluster_features" and not config.CLUSTERFIT.FEATURES.EXTRACT
    )
    return [] if reads_features or job.engine_name not in _MODEL_ENGINES else used_splits(job)


def _open(job: Job, split: str) -> ImageDataset:
    from vissl_like.data.dataset import build_dataset

    config = job.config
    is_trained = job.engine_name == "train"
    return build_dataset(
        config.DATA, split, seed=config.SEED_VALUE, train=is_trained, input_type=config.MODEL.INPUT_TYPE
    )


def _state(job: Job, plan: Plan) -> str:
    """What a start would find there."""
    run_dir = Path(job.config.RUN.DIR)
    if not folder.is_run(run_dir):
        return "new"
    if job.config.RUN.OVERWRITE:
        return "holds a run that would be replaced (RUN.OVERWRITE)"
    try:
        folder.check_reuse(job, plan, run_dir)
    except ConfigError as error:
        return f"cannot be used: {error}"
    done = folder.finished(job, run_dir) is not None
    return "holds this run, finished" if done else "holds this run, which would go on"


def _configuration(job: Job) -> list[str]:
    tree = plain(job)
    shown = tree if job.config.VERBOSE else changed(tree, defaults())
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110).splitlines()


def _stages(job: Job, run_dir: Path) -> Iterator[str]:
    from vissl_like.config.check import compose_stage

    for stage in stage_jobs(job, run_dir, compose_stage):
        done = "finished" if folder.read_json(stage.run_dir / folder.MANIFEST_FILE).get("complete") else "to do"
        after = f", after {', '.join(stage.needs)}" if stage.needs else ""
        yield f"{stage.name}: {stage.job.engine_name} of {stage.recipe or 'this page'}{after} ({done})"


def _describe_split(split: str, dataset: ImageDataset) -> str:
    shape = "x".join(map(str, dataset[0]["data"].shape))
    classes = f"{dataset.num_classes} classes" if dataset.num_classes else "no labels"
    return f"{split}: {len(dataset)} images, {classes}, tensors {shape}, {dataset.name}"


# --------------------------------------------------------------------------------------------------------------- model
def _model_parts(job: Job, plan: Plan, sets: dict[str, ImageDataset]) -> list[tuple[str, list[str]]]:
    from vissl_like.core.weights import load_initial_weights
    from vissl_like.models.zoo import build_on_meta, stores_heads

    config, is_training = job.config, job.engine_name == "train"
    predicts = is_training or job.engine_name == "extract_label_predictions"
    with_heads = predicts or stores_heads(config.MODEL.FEATURE_EVAL_SETTINGS)
    shape = tuple(next(iter(sets.values()))[0]["data"].shape)
    classes = max((dataset.num_classes or 0 for dataset in sets.values()), default=0)
    model = build_on_meta(config.MODEL, num_classes=classes or None, image_size=shape[-2:], with_heads=with_heads)
    weights = config.MODEL.WEIGHTS_INIT
    if weights.PARAMS_FILE.startswith(("http://", "https://", "hf:", "timm:", "torchvision:")):
        loaded = [f"{weights.PARAMS_FILE} is fetched and checked when the run starts"]
    else:
        report = load_initial_weights(model, weights, feature_eval=config.MODEL.FEATURE_EVAL_SETTINGS)
        loaded = report.table().splitlines()
    return [
        ("Weights", loaded),
        ("Model (built without memory)", _parameters(config, model)),
        ("Memory per process (an estimate)", _memory(config, plan, model, shape=shape, is_training=is_training)),
    ]


def _parameters(config: Config, model: Any) -> list[str]:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return [
        f"trunk {config.MODEL.TRUNK.NAME}: {count(model.trunk):,} parameters",
        f"heads: {count(model.heads):,} parameters in {len(model.heads)}",
        f"trained: {trained:,}",
    ]


def _memory(config: Config, plan: Plan, model: Any, *, shape: tuple[int, ...], is_training: bool) -> list[str]:
    """Bytes of weights, gradients, optimizer state and activations of one forward pass."""
    all_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = [("weights", all_bytes)]
    if is_training:
        state = _OPTIMIZER_BYTES.get(config.OPTIMIZER.NAME, 8) * trained
        rows += [("gradients", 4 * trained), (f"optimizer state ({config.OPTIMIZER.NAME})", state)]
        if config.MODEL.EMA.ENABLED:
            rows.append(("moving average", all_bytes))
    per_value = 4 if plan.precision == "fp32" else 2
    activations = _activations(model, (plan.batch_per_rank, *shape), keep_all=is_training)
    lines = [f"{name}: {_megabytes(size)}" for name, size in rows]
    if activations is None:
        return [*lines, "activations: not known (the model cannot run without memory)"]
    size = activations * per_value
    total = sum(size for _, size in rows) + size
    kept = "all kept for the backward pass" if is_training else "the largest two layers"
    lines.append(f"activations, {plan.batch_per_rank} images ({plan.precision}; {kept}): {_megabytes(size)}")
    return [*lines, f"together about {_megabytes(total)}, without the library's own and the loader's"]


def _activations(model: nn.Module, shape: tuple[int, ...], *, keep_all: bool) -> int | None:
    """Values that the layers put out for one batch: all of them, or twice the largest. None if it cannot be run."""
    import torch

    sizes: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel())

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        with torch.no_grad():
            model.eval()(torch.empty(shape, device="meta"))
    except Exception:  # some operations of library models exist on real devices only
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes) if keep_all else 2 * max(sizes, default=0)


def _megabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"
