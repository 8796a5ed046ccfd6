"""What a dry run says of the images and the model of one job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vissl_like.config.plan import Plan
from vissl_like.config.schema import Config, Job
from vissl_like.config.schema_model import Model
from vissl_like.registry import resolve

if TYPE_CHECKING:
    from torch import nn

    from vissl_like.data.images import ImageDataset

#: Bytes of optimizer state per trained parameter (fp32).
_OPTIMIZER_BYTES = {"sgd": 4, "lars": 4, "rmsprop": 8, "adam": 8, "adamw": 8}


def open_split(job: Job, split: str) -> ImageDataset:
    """The data set of a split, as the job would have it."""
    from vissl_like.data.dataset import build_dataset
    from vissl_like.data.mask_rules import MODELS_WITH_MASKS

    config = job.config
    is_trained = job.engine_name == "train"
    return build_dataset(
        config.DATA,
        split,
        seed=config.SEED_VALUE,
        train=is_trained,
        input_type=config.MODEL.INPUT_TYPE,
        with_masks=config.MODEL.NAME in MODELS_WITH_MASKS,
    )


def refuse_few_images(job: Job, plan: Plan, dataset: ImageDataset) -> None:
    """Raise DataError if these are fewer images than the job's clusters, or than one step of its training needs."""
    if job.engine_name == "train" and dataset.split == "TRAIN" and job.config.OPTIMIZER.NUM_EPOCHS:
        from vissl_like.data.loader import refuse_too_few

        where = (plan.batch_per_rank, plan.accumulate, plan.world_size, job.config.DATA.TRAIN.DROP_LAST)
        refuse_too_few(len(dataset), *where, split="TRAIN")
    if job.engine_name == "cluster_features" and job.config.CLUSTERFIT.FEATURES.EXTRACT:
        from vissl_like.engines.cluster_features import check_rows

        check_rows(job.config, dataset)


def describe_split(split: str, dataset: ImageDataset, *, labels_from: str = "", num_classes: int = 0) -> str:
    """A line about the images of a split; `labels_from`: files that are not there yet, with so many classes (0: unknown)."""
    shape = "x".join(map(str, dataset[0]["data"].shape))
    classes = f"{dataset.num_classes} classes" if dataset.num_classes else "no labels"
    if labels_from:
        classes = f"{num_classes or 'unknown'} classes from {labels_from}"
    return f"{split}: {len(dataset)} images, {classes}, tensors {shape}, {dataset.name}"


# --------------------------------------------------------------------------------------------------------------- model
def model_parts(
    job: Job, plan: Plan, sets: dict[str, ImageDataset], *, num_classes: int = 0, has_weights: bool = True
) -> list[tuple[str, list[str]]]:
    """What can be said about the model for these images. Raises the same errors as a start would.

    num_classes: where the labels are not there yet; without `has_weights` it is the weights that are not there yet.
    """
    from vissl_like.core.weights import load_initial_weights
    from vissl_like.models.zoo import build_on_meta, stores_heads

    config, is_training = job.config, job.engine_name == "train"
    predicts = is_training or job.engine_name == "extract_label_predictions"
    with_heads = predicts or stores_heads(config.MODEL.FEATURE_EVAL_SETTINGS)
    shape = tuple(next(iter(sets.values()))[0]["data"].shape)
    classes = num_classes or max((dataset.num_classes or 0 for dataset in sets.values()), default=0)
    section, weights = config.MODEL, config.MODEL.WEIGHTS_INIT
    is_fetched = weights.PARAMS_FILE.startswith(("http://", "https://", "hf:", "timm:", "torchvision:"))
    is_known = has_weights and not is_fetched
    if with_heads and not is_training and is_known:
        from vissl_like.engines.extract_features import with_saved_heads

        section, is_resolved = with_saved_heads(section)
        classes = 0 if is_resolved else classes
    model: Any
    if section.NAME == "vision":
        model = build_on_meta(section, num_classes=classes or None, image_size=shape[-2:], with_heads=with_heads)
    else:
        model = _other_on_meta(section, num_classes=classes or None, image_size=shape[-2:])
    if is_known:
        report = load_initial_weights(model, weights, feature_eval=config.MODEL.FEATURE_EVAL_SETTINGS)
        loaded = report.table().splitlines()
    else:
        loaded = [f"weights {weights.PARAMS_FILE}: {'fetched and ' if is_fetched else ''}checked when the run starts"]
    return [
        ("Weights", loaded),
        ("Model (built without memory)", _parameters(config, model)),
        ("Memory per process (an estimate)", _memory(config, plan, model, shape=shape, is_training=is_training)),
    ]


def _other_on_meta(section: Model, *, num_classes: int | None, image_size: tuple[int, ...]) -> Any:
    import torch

    build = resolve("model", section.NAME, key="MODEL.NAME")
    with torch.device("meta"):
        return build(section, num_classes=num_classes, image_size=image_size)


def _parameters(config: Config, model: Any) -> list[str]:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_plain = config.MODEL.NAME == "vision"
    return [
        f"trunk {config.MODEL.TRUNK.NAME}: {count(model.trunk):,} parameters",
        f"heads: {count(model.heads):,} parameters" + (f" in {len(model.heads)}" if is_plain else ""),
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
