"""Names of components, options that must fit together, files that must exist."""

from pathlib import Path

import pytest

from vissl_like import registry
from vissl_like.compat.ifam import translate
from vissl_like.config import components, rules
from vissl_like.config.check import load_job
from vissl_like.errors import ConfigError, DataError, WeightsError

BASE = "config=debug/supervised_synthetic"
LR = "config.OPTIMIZER.PARAM_SCHEDULERS.LR"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.LOSS.NAME=cross_entropi", "LOSS.NAME='cross_entropi': no such loss; did you mean cross_entropy? Known:"),
        ("config.MODEL.TRUNK.NAME=resnet_smal", "no such trunk; did you mean resnet_small?"),
        ("config.MODEL.TRUNK.NAME=tim/resnet18", "Known: "),
        ("config.MODEL.TRUNK.NAME=timm/", "timm/NAME"),
        ("config.MODEL.HEAD.PARAMS=[[mlpp,{}]]", "config.MODEL.HEAD.PARAMS.0.0='mlpp': no such head; did you mean mlp?"),
        ("config.OPTIMIZER.NAME=sdg", "no such optimizer; did you mean sgd?"),
        ("config.DATA.TRAIN.DATA_SOURCES=[synthtic]", "no such data source; did you mean synthetic?"),
        ("config.DATA.TRAIN.LABEL_SOURCES=[disk_foldr]", "config.DATA.TRAIN.LABEL_SOURCES.0='disk_foldr'"),
        ("config.TASK.NAME=supervized", "no such task; did you mean supervised?"),
        (f"{LR}.NAME=cosin", f"{LR}.NAME='cosin': no such schedule; did you mean cosine?"),
        ("config.MODEL.WEIGHTS_INIT.PRESET=mocco", "no such weight preset; did you mean moco"),
        ("config.DATA.TRAIN.TRANSFORMS=[{name: Resise}]",
         "config.DATA.TRAIN.TRANSFORMS.0.name='Resise': no such transform; did you mean Resize?"),
        ("config.DATA.TRAIN.TRANSFORMS=[{size: 3}]", "a transform is {name: NAME"),
        ("engine_name=extract_cluster", "no such engine"),
    ],
)  # fmt: skip
def test_names_of_components(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job([BASE, override])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["timm/vit_small_patch16_224", "torchvision/resnet18", "hf/facebook/dinov2-small"])
def test_trunks_of_libraries_are_taken_by_their_prefix(name: str) -> None:
    assert load_job([BASE, f"config.MODEL.TRUNK.NAME={name}"]).job.config.MODEL.TRUNK.NAME == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{LR}.NAME=multistep", f"{LR}.VALUES=[0.1]", f"{LR}.MILESTONES=[1]"], "1 MILESTONES need 2 values, not 1."),
        ([f"{LR}.NAME=multistep", f"{LR}.VALUES=[3,2,1]", f"{LR}.MILESTONES=[2,1]"], "epochs must rise"),
        ([f"{LR}.NAME=composite", f"{LR}.SCHEDULERS=[{{NAME: linear}}]", f"{LR}.LENGTHS=[0.5]"], "LENGTHS"),
        (["config.DATA.TRAIN.DATASET_NAMES=[a,b]"], "2 entries, but DATA_SOURCES=['synthetic'] has 1"),
        (
            ["config.DATA.TRAIN.DATA_PATHS=[x]"],
            "DATA_PATHS.0='x': the source 'synthetic' (config.DATA.TRAIN.DATA_SOURCES) brings",
        ),
        (
            ["config.DATA.TEST.DATA_SOURCES=[mnist5k]", "config.DATA.TEST.DATA_PATHS=[x]"],
            "TEST.DATA_SOURCES=[disk_folder]; else",
        ),
        (["config.DATA.VAL.DATA_PATHS=[x]"], "needs config.DATA.VAL.DATA_SOURCES=[disk_folder]"),
        (["config.DATA.TRAIN.DATA_SOURCES=[]"], "config.DATA.TRAIN.DATA_SOURCES=[]: the engine train needs data here"),
        (
            ["config.DATA.TEST.DATA_SOURCES=[waterbirds,cub]", "config.DATA.TEST.SUBSET=worst_case"],
            "config.DATA.TEST.SUBSET='worst_case': only waterbirds and toy_waterbirds have such a part, cub (",
        ),
        (["config.DATA.TRAIN.DATA_LIMIT_SAMPLING.IS_BALANCED=true"], "needs config.DATA.TRAIN.DATA_LIMIT"),
        (["config.MODEL.HEAD.PARAMS=[mlp]"], "a head is [name, {options}]"),
        (["config.MODEL.NAME=parts", "config.MODEL.PARTS.USE_SOFT_MASKS=true"], "does not read it, only two_stage"),
        (["config.MODEL.NAME=decoupled", "config.MODEL.PARTS.POOLING_TYPE=gap"], "does not read it, only pooled"),
        (["config.MODEL.NAME=two_stage", "config.MODEL.PARTS.GUMBEL_SOFTMAX_HARD=true"], "read it, only parts"),
        (
            ["config.MODEL.NAME=parts", "config.MODEL.PARTS={GUMBEL_SOFTMAX: false, GUMBEL_SOFTMAX_HARD: true}"],
            "GUMBEL_SOFTMAX_HARD=True: a form of the softmax with Gumbel noise",
        ),
        (
            ["config.LOSS.PARTS.SCALE_L=1.5"],
            "config.LOSS.PARTS.SCALE_L=1.5: must be at most config.LOSS.PARTS.SCALE_U=1.4",
        ),
        (["config.MODEL.PARTS.REMOVE_PARTS=[1]"], "REMOVE_PARTS=[1]: config.MODEL.NAME='vision' does not read it"),
        (
            ["config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP=[res5]"],
            "an entry is [layer, [pooling, arguments]]",
        ),
        (["engine_name=pipeline"], "a pipeline needs at least one stage"),
        (["config.DISTRIBUTED.BACKEND=nccl", "config.MACHINE.DEVICE=cpu"], "nccl"),
        (["config.DISTRIBUTED.STRATEGY=fsdp", "config.MACHINE.COMPILE=model"], "Use blocks"),
        (
            [
                "config.DISTRIBUTED.STRATEGY=fsdp",
                "config.LOGGERS.TENSORBOARD.ENABLED=true",
                "config.LOGGERS.TENSORBOARD.LOG_PARAMS=true",
            ],
            "no process has whole weights",
        ),
        (
            ["config.DISTRIBUTED.STRATEGY=fsdp", "config.OPTIMIZER.NAME=sgd", "config.OPTIMIZER.OPTIONS={fused: true}"],
            "no fused step of config.OPTIMIZER.NAME='sgd' for sharded weights",
        ),
        (["config.DATA.MIX.MIXUP=0.2"], "config.TASK.NAME='supervised' mixes no images"),
        (["config.DATA.MIX.CUTMIX_MINMAX=[0.2,0.8]"], "config.TASK.NAME='supervised' mixes no images"),
    ],
)
def test_options_that_do_not_fit_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job([BASE, *overrides])
    assert message in str(caught.value)


def test_a_source_of_a_plugin_may_read_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.COMPONENTS["data_source"], "my_birds", "my_plugin:Birds")
    subset = "config.DATA.TEST.SUBSET=worst_case"
    job = load_job([BASE, "config.DATA.TEST.DATA_SOURCES=[my_birds]", subset]).job
    assert job.config.DATA.TEST.SUBSET == "worst_case"
    with pytest.raises(ConfigError, match="have such a part, cub "):
        load_job([BASE, "config.DATA.TEST.DATA_SOURCES=[my_birds,cub]", subset])


def test_groups_by_role_read_no_other_rules_of_grouping() -> None:
    """Each of them would be ignored, or half applied (the rate of heads: to the first stage's alone)."""
    wanted = {
        "GROUPS": "[{MATCH: bias}]", "REGULARIZE_BN": "true", "REGULARIZE_BIAS": "false",
        "NON_REGULARIZED_PARAMETERS": "[norm]", "CONSTRUCT_SINGLE_PARAM_GROUP_ONLY": "true",
        "HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR": "true", "HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_WD": "true",
    }  # fmt: skip
    overrides = [f"config.OPTIMIZER.{name}={value}" for name, value in wanted.items()]
    with pytest.raises(ConfigError) as caught:
        load_job([BASE, "config.OPTIMIZER.PARAM_GROUP_CONSTRUCTOR=parts", *overrides])
    lines = str(caught.value).splitlines()
    for name in wanted:
        assert any(
            f"config.OPTIMIZER.{name}=" in line and "groups parameters by their role" in line for line in lines
        ), name
    load_job([BASE, *overrides])
    load_job([BASE, "config.OPTIMIZER.PARAM_GROUP_CONSTRUCTOR=parts"])


@pytest.mark.parametrize(("flags", "is_hard"), [("", False), ("--gumbel_softmax", True)])
def test_translated_commands_ask_for_hard_maps_with_gumbel_noise_only(flags: str, is_hard: bool) -> None:
    made = translate(f"--data_path CUB --gumbel_softmax_hard {flags}", script="train_net_pdisco")
    assert load_job(made.words()).job.config.MODEL.PARTS.GUMBEL_SOFTMAX_HARD == is_hard
    assert ("gumbel_softmax_hard" in made.without) != is_hard


@pytest.mark.parametrize(
    "overrides",
    [
        ["config.DISTRIBUTED.STRATEGY=fsdp", "config.OPTIMIZER.NAME=adamw", "config.OPTIMIZER.OPTIONS={fused: true}"],
        ["config.DISTRIBUTED.STRATEGY=fsdp", "config.OPTIMIZER.NAME=sgd", "config.OPTIMIZER.OPTIONS={fused: false}"],
        ["config.OPTIMIZER.NAME=sgd", "config.OPTIMIZER.OPTIONS={fused: true}"],
        ["config.DATA.MIX.MIXUP=0.2", "config.TASK.NAME=parts", "config.MODEL.NAME=pooled"],
    ],
)
def test_their_neighbours_that_do(overrides: list[str]) -> None:
    assert load_job([BASE, *overrides]).job.config.OPTIMIZER.NUM_EPOCHS >= 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.NEAREST_NEIGHBOR.TOPK=[20,0]", "config.NEAREST_NEIGHBOR.TOPK=[20, 0]: must be one or more whole numbers"),
        ("config.NEAREST_NEIGHBOR.TOPK=[]", "config.NEAREST_NEIGHBOR.TOPK=[]: must be one or more"),
        ("config.LOW_SHOT.SAMPLES_PER_CLASS=[0]", "config.LOW_SHOT.SAMPLES_PER_CLASS=[0]: must be one or more"),
        ("config.LINEAR_PROBE.C=[0.1,-1]", "config.LINEAR_PROBE.C=[0.1, -1.0]: must be one or more numbers, each more than 0"),
        ("config.LINEAR_PROBE.C=[]", "config.LINEAR_PROBE.C=[]: must be one or more"),
        ("config.METERS.ACCURACY_LIST_METER.TOPK_VALUES=[0]", "TOPK_VALUES=[0]: must be one or more whole numbers"),
        ("config.EVALUATE.PROTOCOLS=[]", "config.EVALUATE.PROTOCOLS=[]: nothing would be measured"),
    ],
)  # fmt: skip
def test_lists_of_numbers_have_elements_and_bounds(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job([BASE, override])
    assert message in str(caught.value)


def test_milestones_beyond_the_end_are_a_warning() -> None:
    overrides = [f"{LR}.NAME=multistep", f"{LR}.VALUES=[3,2,1]", f"{LR}.MILESTONES=[1,30]"]
    notes = load_job([BASE, *overrides]).notes
    assert notes == (
        f"command line: {LR}.MILESTONES: training ends at config.OPTIMIZER.NUM_EPOCHS=2, so 30 is never reached.",
    )


def test_a_label_type_that_does_not_count_is_said() -> None:
    overrides = ["config.DATA.TRAIN.LABEL_SOURCES=[synthetic]", "config.DATA.TRAIN.LABEL_TYPE=zero"]
    (note,) = load_job([BASE, *overrides]).notes
    assert note.endswith("LABEL_TYPE='zero' is ignored: LABEL_SOURCES says where the labels come from.")


def test_every_stage_of_a_pipeline_is_checked() -> None:
    stages = "[{NAME: a, CONFIG: {SEED_VALU: 1}}, {NAME: b, RECIPE: debug/supervised_synthetc}]"
    with pytest.raises(ConfigError) as caught:
        load_job([BASE, "engine_name=pipeline", f"config.PIPELINE.STAGES={stages}"])
    assert "unknown key config.SEED_VALU; did you mean config.SEED_VALUE?" in str(caught.value)
    assert "did you mean debug/supervised_synthetic?" in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- files
def check(*overrides: str) -> list[str]:
    return rules.check_files(load_job([BASE, *overrides]).job)


def test_lost_files_are_named_with_near_ones(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(WeightsError, match=r"no such file or folder; did you mean .*weights\.pth\?") as caught:
        check(f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={tmp_path}/weigths.pth")
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=r"config\.DATA\.TRAIN\.DATA_PATHS\.0=") as lost:
        check("config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", f"config.DATA.TRAIN.DATA_PATHS=[{tmp_path}/a/b]")
    assert lost.value.exit_code == 3 and f"{tmp_path} exists" in str(lost.value)


def test_all_lost_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        check(f"config.DATA.TRAIN.LABEL_PATHS=[{tmp_path}/a.npy]", f"config.DATA.TEST.LABEL_PATHS=[{tmp_path}/b.npy]")
    assert "a.npy" in str(caught.value) and "b.npy" in str(caught.value)


def test_files_that_are_there_are_returned_and_names_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "labels.npy").touch()
    found = check(
        f"config.DATA.TRAIN.LABEL_PATHS=[{tmp_path}/labels.npy]",
        "config.MODEL.WEIGHTS_INIT.PARAMS_FILE='timm:resnet18'",
    )
    assert found == [f"{tmp_path}/labels.npy"]


def test_the_catalog_is_consulted_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", "config.DATA.TRAIN.DATASET_NAMES=[mine]"]
    with pytest.raises(DataError, match=r"config\.DATA\.TRAIN\.DATASET_NAMES='mine'.*DATA_PATHS"):
        check(*overrides)
    (tmp_path / "dataset_catalog.json").write_text('{"mine": {"train": ["images", ""]}}')
    with pytest.raises(DataError, match=r"config\.DATA\.TRAIN\.DATASET_NAMES\.0=.*images': no such file"):
        check(*overrides)
    (tmp_path / "images").mkdir()
    assert check(*overrides) == [str(tmp_path / "images")]


def test_files_of_all_stages_are_checked_except_those_that_stages_make(tmp_path: Path) -> None:
    from vissl_like.launch.inputs import check_inputs

    stages = (
        "[{NAME: a, CONFIG: {MODEL: {WEIGHTS_INIT: {PARAMS_FILE: none.pth}}}},"
        " {NAME: b, CONFIG: {MODEL: {WEIGHTS_INIT: {PARAMS_FILE: '{a}'}}}}]"
    )
    overrides = ["engine_name=pipeline", f"config.RUN.DIR={tmp_path}/run", f"config.PIPELINE.STAGES={stages}"]
    with pytest.raises(WeightsError, match=r"PARAMS_FILE='none\.pth'") as caught:
        check_inputs(load_job([BASE, *overrides]).job)
    assert "run/a" not in str(caught.value)


def test_a_split_that_is_not_read_need_not_exist(tmp_path: Path) -> None:
    assert check("config.TEST_MODEL=false", f"config.DATA.TEST.LABEL_PATHS=[{tmp_path}/none.npy]") == []


# ---------------------------------------------------------------------------------------------------------- components
def test_transform_names_are_those_that_the_data_package_takes() -> None:
    from vissl_like.data.views import transform_names

    assert set(transform_names()) - set(components.transform_names()) == set()


def test_lists_describe_our_own_components() -> None:
    for word in components.LISTS[1:]:
        found = components.listing(word)
        assert found, word
        if word not in ("transforms",):
            assert all(found.values()), [name for name, text in found.items() if not text]


def test_a_layer_that_is_not_extracted_is_noticed_before_anything_is() -> None:
    with pytest.raises(ConfigError, match="LAYERS='flaten': this run does not extract it; did you mean 'flatten'?"):
        load_job(["config=debug/evaluate_digits", "config.LINEAR_PROBE.LAYERS=[flaten]"])
    with pytest.raises(ConfigError, match="LAYER_NAME='res4'.* It extracts: res5."):
        load_job(
            [
                "config=pretrain/clusterfit/cluster_features_resnet_8gpu_rotation_in1k",
                "config.CLUSTERFIT.FEATURES.LAYER_NAME=res4",
                "config.DATA.TRAIN.DATA_PATHS=[images]",
            ]
        )
    load_job(["config=debug/evaluate_digits", "config.LINEAR_PROBE.LAYERS=[res3]"])
