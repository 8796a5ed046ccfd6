"""Engine `train`: trains a model on labels (given, pseudo- or made by a transform) and tests it.

Heads on one or several layers of a frozen trunk are trained by the same code: MODEL.FEATURE_EVAL_SETTINGS.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vissl_like.analysis.extraction import Loading
from vissl_like.analysis.meters import MeterGroup, build_meters, ignored_target
from vissl_like.config.plan import Plan, make_plan, write_plan
from vissl_like.config.schema import Config, Job
from vissl_like.config.schema_model import Meters
from vissl_like.core import checkpoint, distributed, parallel, rng
from vissl_like.core.evaluation import Arithmetic, evaluate
from vissl_like.core.loop import TESTS, Options, Training
from vissl_like.core.on_main import on_main
from vissl_like.core.weights import load_initial_weights
from vissl_like.data.dataset import build_dataset, is_used
from vissl_like.data.images import ImageDataset
from vissl_like.data.mask_rules import MODELS_WITH_MASKS
from vissl_like.engines.feeds import Splits, loading, make_feed, test_feed, train_feed
from vissl_like.engines.part_setup import make_groups, start_prototypes, test_facts
from vissl_like.errors import ConfigError, WeightsError
from vissl_like.files import write_text
from vissl_like.losses.classification import row_weights
from vissl_like.models.ema import Ema
from vissl_like.models.heads import is_chain
from vissl_like.models.vision_model import VisionModel
from vissl_like.optim import groups as param_groups
from vissl_like.optim.schedules import Rates
from vissl_like.outputs.part_figures import Drawing
from vissl_like.outputs.writers import Writers, read_metrics, rewind
from vissl_like.registry import resolve
from vissl_like.tasks.request import TaskRequest

WEIGHTS_REPORT = "weights_report.json"

log = logging.getLogger(__name__)


class Silent:
    """The record of all ranks but the main one."""

    def metrics(self, record: Mapping[str, Any]) -> None:
        pass

    def progress(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        pass

    def watch(self, model: torch.nn.Module) -> None:
        pass

    def close(self) -> None:
        pass


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Train, or test only, and return the final metrics. Called on every rank."""
    config = job.config
    world = distributed.current()
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    splits = open_splits(config, run_dir)
    plan = make_plan(
        config,
        num_processes=world.size,
        device="gpu" if world.device.type == "cuda" else "cpu",
        num_train=None if splits.train is None else len(splits.train),
    )
    if distributed.is_main():
        write_plan(plan, run_dir)  # again, now that the number of images is known
        log.info("%d steps per epoch, %d in all", plan.steps_per_epoch or 0, plan.total_steps or 0)
    check_labels(config, splits)
    for dataset in splits.all:
        dataset.write_label_map(run_dir)
    weigh_rows(config, splits)
    warn_of_other_classes(splits)
    model = make_model(config, splits)
    saved = on_main(lambda: find_checkpoint(config, run_dir))
    if saved is None:
        start_weights(model, config, run_dir)
        if splits.train is not None:
            reading = Loading(**loading(config, plan), arithmetic=arithmetic(config, plan))
            start_prototypes(model, splits.train, config, loading=reading, batch=plan.batch_per_rank)
    try:
        if splits.train is None:
            if saved is None:
                warn_of_random_weights(config, model)
            else:
                saved.load_into(model)
            return test_only(job, model, splits, plan, run_dir, averages=saved_averages(config, saved))
        return train(job, model, splits, plan, run_dir, saved)
    finally:
        splits.close()


def open_splits(config: Config, run_dir: Path) -> Splits:
    """The datasets that this run uses."""
    data, seed = config.DATA, config.SEED_VALUE
    build = partial(
        build_dataset,
        data,
        seed=seed,
        input_type=config.MODEL.INPUT_TYPE,
        run_dir=run_dir,
        with_masks=config.MODEL.NAME in MODELS_WITH_MASKS,
    )
    with_test = is_used(data, "TEST") and (config.TEST_MODEL or config.TEST_ONLY)
    if config.TEST_ONLY and not with_test:
        raise ConfigError("config.TEST_ONLY=true needs a test split: set config.DATA.TEST.DATA_SOURCES.")
    train = None if config.TEST_ONLY else build("TRAIN", train=True)
    test = build("TEST", train=True) if with_test else None
    return Splits(train=train, test=test)


def make_model(config: Config, splits: Splits) -> VisionModel:
    """The model on its device, randomly initialised, the same on every rank."""
    rng.seed_model(config.SEED_VALUE)
    num_classes = max((split.num_classes or 0 for split in (splits.train, splits.test) if split is not None), default=0)
    image = sample_input(splits.any)
    build = resolve("model", config.MODEL.NAME, key="MODEL.NAME")
    model = build(config.MODEL, num_classes=num_classes or None, image_size=tuple(image.shape[-2:]))
    check_inputs(model, splits)
    for name in model.idle_parameters(image.shape[-2:]):  # they would stop DDP, and never change anyway
        model.get_parameter(name).requires_grad_(False)
    if config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN:
        model = parallel.synchronise_norms(model, group_size=config.MODEL.SYNC_BN_CONFIG.GROUP_SIZE)
    layout = torch.channels_last if config.MACHINE.CHANNELS_LAST else torch.preserve_format
    device = torch.device("cpu") if parallel.is_to_be_sharded(config) else distributed.current().device
    return model.to(device, memory_format=layout)


def sample_input(dataset: ImageDataset) -> torch.Tensor:
    """One image as the model gets it, (1, C, H, W)."""
    sample = dataset[0]
    try:
        return dataset.device_transform(*(sample[name][None] for name in ("data", "draws") if name in sample))
    except RuntimeError as error:
        channels = len(sample["data"])
        raise ConfigError(
            f"config.DATA.{dataset.split}.TRANSFORMS: Normalize does not fit images of {channels} channels ({error})."
        ) from error


def check_inputs(model: VisionModel, splits: Splits) -> None:
    """Raise ConfigError if a split's images do not fit the model, before anything is trained."""
    for dataset in splits.all:
        model.check_input(tuple(sample_input(dataset).shape[1:]), key=f"config.DATA.{dataset.split}.TRANSFORMS")


def check_labels(config: Config, splits: Splits) -> None:
    """Raise ConfigError if loss or meters want labels of another form than the images have."""
    for dataset in splits.all:
        labels = None if dataset.views.label_names else dataset.labels
        is_multi = labels is not None and labels.ndim == 2
        wrong = [name for name in config.METERS.NAMES if (name == "accuracy_list_meter") == is_multi]
        if wrong:
            form = "several classes" if is_multi else "one class"
            cure = "[mean_ap_list_meter]" if is_multi else "[accuracy_list_meter]"
            raise ConfigError(
                f"config.METERS.NAMES={config.METERS.NAMES}: {wrong[0]} does not go with labels of {form} per image, as "
                f"config.DATA.{dataset.split} has. Set config.METERS.NAMES={cure}."
            )
        if labels is not None and is_multi and config.LOSS.NAME == "cross_entropy" and (labels < 0).any():
            raise ConfigError(
                f"config.LOSS.NAME='cross_entropy': some labels of config.DATA.{dataset.split} are -1 (unknown), which it "
                "would take for shares of classes. Set config.LOSS.NAME=bce_logits."
            )


def weigh_rows(config: Config, splits: Splits) -> None:
    """Where the loss leaves labels out or weighs classes, rows count by that in means over batches, steps and epochs."""
    if config.TASK.NAME != "supervised":
        return
    for dataset in splits.all:
        dataset.weigh_rows(partial(row_weights, loss=config.LOSS))


def warn_of_other_classes(splits: Splits) -> None:
    """Say so if the labels of training and test speak of different things: the test would then measure nothing."""
    train_set, test_set = splits.train, splits.test
    if train_set is None or test_set is None or not distributed.is_main():
        return
    trained, tested = train_set.class_names, test_set.class_names
    if trained is None and tested is not None and tested != [str(k) for k in range(len(tested))]:
        log.warning(
            "config.DATA.TRAIN has class numbers without names (pseudo-labels?), config.DATA.TEST the classes %s, ...: "
            "test metrics compare the one with the other. Set config.TEST_MODEL=false, or give TEST labels of the same "
            "kind.",
            ", ".join(tested[:3]),
        )
    elif trained is not None and tested is not None and tested[: len(trained)] != trained:
        log.warning(
            "config.DATA.TRAIN has the classes %s, ..., config.DATA.TEST %s, ...: test metrics compare the one with the "
            "other.",
            ", ".join(trained[:3]),
            ", ".join(tested[:3]),
        )


def find_checkpoint(config: Config, run_dir: Path) -> checkpoint.Saved | None:
    """The checkpoint to go on from, or None."""
    if config.CHECKPOINT.AUTO_RESUME:
        return checkpoint.newest(run_dir)
    if checkpoint.saved_steps(run_dir) and not config.TEST_ONLY:
        raise ConfigError(
            f"config.CHECKPOINT.AUTO_RESUME=false, but {run_dir} holds checkpoints. Set config.RUN.OVERWRITE=true to "
            "start anew there, or choose another config.RUN.DIR."
        )
    return None


def start_weights(model: VisionModel, config: Config, run_dir: Path) -> None:
    """Fill the model from MODEL.WEIGHTS_INIT and write down what became of each tensor."""
    report = load_initial_weights(model, config.MODEL.WEIGHTS_INIT, feature_eval=config.MODEL.FEATURE_EVAL_SETTINGS)
    if distributed.is_main():
        log.info("%s", report.table())
        write_text(run_dir / WEIGHTS_REPORT, report.to_json())


def warn_of_random_weights(config: Config, model: VisionModel) -> None:
    """Say so if a model is measured that nothing was loaded into."""
    is_random = not config.MODEL.WEIGHTS_INIT.PARAMS_FILE and next(model.parameters(), None) is not None
    if is_random and distributed.is_main():
        log.warning(
            "config.MODEL.WEIGHTS_INIT.PARAMS_FILE is empty and the run's folder holds no save: what is measured are random "
            "weights."
        )


def train(
    job: Job, model: VisionModel, splits: Splits, plan: Plan, run_dir: Path, saved: checkpoint.Saved | None
) -> dict[str, Any]:
    """Train from the checkpoint or from the start."""
    config, optimization, train_set = job.config, job.config.OPTIMIZER, splits.train
    assert train_set is not None
    steps_per_epoch = plan.steps_per_epoch or 0
    if steps_per_epoch == 0 and optimization.NUM_EPOCHS:
        next(train_feed(config, train_set, plan)(0, 0, True))  # raises the loader's error for too few images
    drawing = Drawing.of(config, run_dir)
    task = make_task(config, model, splits, drawing=drawing)  # asks for widths, which a sharded model cannot tell
    parallel.arrange(model, config, inner=model.read_modules())
    optimization = optimization.model_copy(update={"WEIGHT_DECAY": plan.weight_decay})
    groups = make_groups(model, optimization)
    if distributed.is_main():
        log.info("parameter groups\n%s", param_groups.table(groups))
    options = loop_options(config, plan)
    record = open_record(job, run_dir, total_steps=options.total_steps, first_step=(saved.step if saved else 0) + 1)
    record.watch(model)
    try:
        training = Training(
            task=parallel.wrap_for_gradients(
                task,
                broadcast_buffers=config.DISTRIBUTED.BROADCAST_BUFFERS,
                bucket_cap_mb=config.DISTRIBUTED.BUCKET_CAP_MB,
            ),
            optimizer=param_groups.build_optimizer(groups, optimization),
            groups=groups,
            rates=Rates(
                lr=plan.lr,
                lr_head=plan.lr_head,
                weight_decay=optimization.PARAM_SCHEDULERS.WEIGHT_DECAY,
                steps_per_epoch=max(1, steps_per_epoch),
                num_epochs=max(1, optimization.NUM_EPOCHS),
            ),
            feed=make_feed(config, splits, plan),
            options=options,
            run_dir=run_dir,
            record=record,
            ema=make_ema(config, model, total_steps=options.total_steps),
        )
        if saved is not None:
            log.info("continuing after step %d of %d", saved.step, options.total_steps)
            training.resume(saved)
            training.known_tests = known_tests(run_dir, saved.step)
        return training.run()
    finally:
        record.close()


def saved_averages(config: Config, saved: checkpoint.Saved | None) -> dict[str, torch.Tensor] | None:
    """The averaged weights beside those that are tested, if MODEL.EMA is enabled and there are any."""
    path = Path(config.MODEL.WEIGHTS_INIT.PARAMS_FILE).expanduser()
    if not config.MODEL.EMA.ENABLED or (saved is None and not path.is_dir()):
        return None
    try:
        return saved.ema_state() if saved is not None else checkpoint.load_model_state(path, averaged=True)
    except WeightsError as error:
        log.warning("the average of the weights is not tested: %s", error)
        return None


def test_only(
    job: Job,
    model: VisionModel,
    splits: Splits,
    plan: Plan,
    run_dir: Path,
    *,
    averages: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """One test of the weights as they are, and one of their `averages`."""
    assert splits.test is not None
    config = job.config
    task = make_task(config, model, splits, drawing=Drawing.of(config, run_dir))

    def measure(prefix: str) -> dict[str, Any]:
        assert splits.test is not None
        found = evaluate(
            task,
            test_feed(config, splits.test, plan)(),
            to_input=splits.test.device_transform,
            arithmetic=arithmetic(config, plan),
            seed=config.SEED_VALUE,
            prefix=prefix,
            epoch=0 if prefix == TESTS[0] else None,
        )
        assert found is not None
        return found

    found = measure(TESTS[0])
    if averages is not None:
        ema = Ema(model, options=config.MODEL.EMA, total_steps=0)
        ema.load_state_dict(averages)
        with ema.in_place():
            found |= measure(TESTS[1])
    splits.test.write_bad_images()
    record = open_record(job, run_dir, total_steps=0, first_step=1)
    record.metrics({"kind": "test", "step": 0, "epoch": 0, **found})
    record.close()
    return found


def make_ema(config: Config, model: VisionModel, *, total_steps: int) -> Ema | None:
    """The moving average of the weights, if one is wanted."""
    options = config.MODEL.EMA
    return Ema(model, options=options, total_steps=total_steps) if options.ENABLED else None


def make_task(config: Config, model: VisionModel, splits: Splits, *, drawing: Drawing | None = None) -> torch.nn.Module:
    """The task of TASK.NAME: model, loss and meters in one module."""
    make = resolve("task", config.TASK.NAME, key="TASK.NAME")
    if hasattr(make, "build"):
        return make.build(model, task_request(config, splits, drawing=drawing))
    num_outputs = count_outputs(model)
    meters = named_meters(config.METERS, model, num_outputs=num_outputs)
    build = partial(
        build_meters,
        meters,
        num_heads=num_outputs,
        ignore_index=ignored_target(config.LOSS),
        widths=model.output_widths(tuple(sample_input(splits.any).shape[-2:])),
    )
    train_meters: MeterGroup | None = build() if config.METERS.ENABLE_TRAINING_METER else None
    return make(
        model, loss=config.LOSS, train_meters=train_meters, test_meters=build(), largest_label=largest_label(splits)
    )


def task_request(config: Config, splits: Splits, *, drawing: Drawing | None = None) -> TaskRequest:
    """What a task is told about the run."""
    test = splits.test
    names = next((split.class_names for split in (splits.train, test) if split and split.class_names), None)
    return TaskRequest(
        loss=config.LOSS,
        meters=config.METERS,
        mix=config.DATA.MIX,
        num_classes=max((split.num_classes or 0 for split in (splits.train, test) if split), default=0) or None,
        class_names=names or (),
        largest_label=largest_label(splits),
        facts=test_facts(test, splits.train),
        image_size=tuple(sample_input(splits.any).shape[-2:]),
        drawing=drawing,
    )


def count_outputs(model: VisionModel) -> int:
    """How many outputs the model gives: one per head, one of a chain of heads, one per feature without heads."""
    num_features, num_heads = len(model.feature_names()), len(model.heads)
    if not num_heads:
        return num_features
    return 1 if is_chain(num_features=num_features, num_heads=num_heads) else num_heads


def named_meters(meters: Meters, model: VisionModel, *, num_outputs: int) -> Meters:
    """Meters of heads on several layers are named after the layers, unless they have names."""
    names = model.feature_names()
    if num_outputs < 2 or len(names) != num_outputs:
        return meters
    named = {
        section: getattr(meters, section).model_copy(update={"METER_NAMES": names})
        for section in (name.upper() for name in meters.NAMES)
        if not getattr(meters, section).METER_NAMES
    }
    return meters.model_copy(update=named)


def largest_label(splits: Splits) -> int | None:
    """The largest class number of all samples, or None for labels of another form."""
    largest = []
    for dataset in (splits.train, splits.test):
        if dataset is None or dataset.labels is None or dataset.views.label_names:
            continue  # a transform makes the labels
        if dataset.labels.ndim == 1 and len(dataset.labels):
            largest.append(int(dataset.labels.max()))
    return max(largest, default=None)


def arithmetic(config: Config, plan: Plan) -> Arithmetic:
    return Arithmetic(precision=plan.precision, channels_last=config.MACHINE.CHANNELS_LAST)


def loop_options(config: Config, plan: Plan) -> Options:
    """What the loop takes from the configuration and the plan."""
    return Options(
        seed=config.SEED_VALUE,
        num_epochs=config.OPTIMIZER.NUM_EPOCHS,
        steps_per_epoch=plan.steps_per_epoch or 0,
        accumulate=plan.accumulate,
        arithmetic=arithmetic(config, plan),
        clip=config.MODEL.GRAD_CLIP,
        check_nan=config.CHECK_NAN,
        log_every=config.LOG_FREQUENCY,
        test_every=config.TEST_EVERY_NUM_EPOCH,
        save_every_epochs=config.CHECKPOINT.EVERY_EPOCHS,
        save_every_steps=config.CHECKPOINT.EVERY_STEPS,
        keep=config.CHECKPOINT.KEEP,
        save_async=config.CHECKPOINT.ASYNC,
        best_metric=config.CHECKPOINT.BEST_METRIC,
        profile=config.PROFILE,
    )


def open_record(job: Job, run_dir: Path, *, total_steps: int, first_step: int) -> Writers | Silent:
    """Writers on the main rank. What was recorded beyond the checkpoint is dropped first: it will be recorded again."""
    if not distributed.is_main():
        return Silent()
    rewind(run_dir, first_step - 1)
    config = job.config
    return Writers(
        run_dir,
        loggers=config.LOGGERS,
        run=config.RUN,
        engine=job.engine_name,
        log_frequency=config.LOG_FREQUENCY,
        total_steps=total_steps,
        first_step=first_step,
    )


def known_tests(run_dir: Path, step: int) -> dict[int, dict[str, float]]:
    """The test of this step, if it was recorded before the run was interrupted: it need not run again."""
    found: dict[int, dict[str, float]] = {}
    for record in read_metrics(run_dir) if distributed.is_main() else []:
        if record.get("kind") == "test" and record.get("step") == step:
            found[step] = {key: value for key, value in record.items() if key not in ("kind", "step", "epoch")}
    return distributed.broadcast_object(found)
