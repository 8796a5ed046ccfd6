"""Command lines of iFAM in our words: every flag, every typing error of its documentation."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import part_folders
from vissl_like.compat import ifam, ifam_flags, ifam_table
from vissl_like.config.check import load_job
from vissl_like.errors import ConfigError
from vissl_like.launch.main import main

#: The commands of the document, typing errors included: the complete one, and those of the data sets without the model's.
PUBLISHED: dict[str, str] = dict(
    re.findall(
        r"^(\w+)\n```\n(.*?)^```$",
        (Path(__file__).parents[1] / "data" / "ifam_commands.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


def published(name: str, data: str | Path = "<base path to dataset>") -> str:
    """A command of the document; those of the data sets get the model's flags from the complete one. `data`: a folder."""
    complete, command = PUBLISHED["complete"], PUBLISHED[name]
    if name != "complete":
        of_data = {*re.findall(r"--\w+", PUBLISHED["cub"] + command)} | {"--nnodes", "--nproc_per_node"}
        lines = [line for line in complete.splitlines() if line.startswith("--")]
        of_model = "\n".join(line for line in lines if re.findall(r"--\w+", line)[0] not in of_data)
        command = command.replace("< model specific parameters >", of_model)
    return command.replace("<base path to dataset>", shlex.quote(str(data)) if isinstance(data, Path) else data)


#: Smaller trunks, for speed; the complete command is tried with its own.
SMALL_TIMM = "config.MODEL.TRUNK.OPTIONS={embed_dim:48,depth:2,num_heads:4}"
SMALL = {
    "complete": [], "cub": [SMALL_TIMM], "waterbirds": [SMALL_TIMM], "meta_shift": [SMALL_TIMM],
    "siim_acr": ["config.MODEL.TRUNK.OPTIONS={image_size:518,hidden_size:48,num_hidden_layers:2,num_attention_heads:4}"],
}  # fmt: skip
#: Every flag of the two-stage trainer's parser, and those that its losses and data sets read beside.
PARSER = """
model_arch use_hf_transformers use_torchvision_resnet_model data_path image_sub_path_train image_sub_path_test dataset
train_split eval_mode mask_sub_path snapshot_dir save_every_n_epochs batch_size epochs num_workers seed
grad_accumulation_steps amap_saving_prob grad_norm_clip use_amp eval_only crop_pct mixup cutmix cutmix_minmax mixup_prob
mixup_switch_prob mixup_mode augmentations_to_use image_size color_jitter aa train_interpolation
imagenet_default_mean_and_std hflip vflip reprob remode recount resplit num_parts pretrained_start_weights
pretrained_model_path drop_path_stage_1 drop_path_stage_2 output_stride freeze_backbone freeze_params_stage_1
freeze_params_stage_2 freeze_second_stage optimizer_type weight_decay momentum betas1 betas2 dampening trust_coeff
always_adapt turn_off_grad_averaging max_grad_norm use_zero scheduler_type scheduler_warmup_epochs warmup_lr
scheduler_restart_factor cosine_cycle_limit scheduler_gamma scheduler_step_size min_lr lr scratch_lr_factor
finer_lr_factor modulation_lr_factor stage_two_lr_factor wandb wandb_project job_type wandb_entity group wandb_mode
log_interval resume_training wandb_resume_id classification_loss classification_loss_stage_2 presence_loss
presence_loss_beta presence_loss_type concentration_loss equivariance_loss total_variation_loss enforced_presence_loss
enforced_presence_loss_type pixel_wise_entropy_loss orthogonality_loss_landmarks degrees translate_x translate_y scale_l
scale_u shear_x shear_y part_dropout part_dropout_stage_2 gumbel_softmax softmax_temperature gumbel_softmax_hard
array_training_job part_logits_threshold_path intervention_fixed_part_id use_soft_masks smoothing averaging_type
model_ema_force_cpu model_ema_decay no_model_ema_warmup use_bce_loss bce_sum bce_target_thresh bce_pos_weight split_type
"""


def test_the_documents_command() -> None:
    found = ifam.translate(published("complete"))
    assert found.overrides["config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE"] == 2.828e-6
    assert found.overrides["config.OPTIMIZER.PARTS.SCRATCH_LR_FACTOR"] == 1e4
    assert found.overrides["config.DISTRIBUTED.NUM_PROC_PER_NODE"] == 8
    assert found.overrides["config.MODEL.PARTS.FREEZE_BACKBONE"] is True
    assert found.overrides["config.DATA.TRAIN.DATA_PATHS"] == ["<base_path_to_dataset>/CUB_200_2011"]
    assert sum("typing error" in line for line in found.notices) == 3
    placeholders = [line.split()[0][2:] for line in found.notices if "placeholder" in line]
    assert sorted(placeholders) == sorted(
        "data_path save_every_n_epochs wandb_entity wandb_project wandb_mode job_type group snapshot_dir".split()
    )
    assert not any("save_every_n_epochs is not given" in line for line in found.notices)
    assert "config.LOGGERS.WANDB.MODE" not in found.overrides  # online or offline: the default
    assert not found.without


def test_words_for_more_flags_are_no_typing_error() -> None:
    found = ifam.translate(
        "torchrun --nproc_per_node=<gpus per node> train_net.py --lr 1 < model specific parameters >"
    )
    assert any("<model_specific_parameters> stands for flags" in line for line in found.notices)
    assert any("one process for each GPU" in line for line in found.notices)
    assert "config.DISTRIBUTED.NUM_PROC_PER_NODE" not in found.overrides


@pytest.mark.parametrize(
    ("start", "processes", "notice"),
    [
        ("torchrun --standalone --nproc-per-node 4 a/train_net.py", 4, "--standalone: for the launcher"),
        ("python -m torch.distributed.run --nproc_per_node=2 train_net.py", 2, "-m torch.distributed.run: for the"),
        ("CUDA_VISIBLE_DEVICES=0,1 python3 train_net.py", None, "CUDA_VISIBLE_DEVICES=0,1: put it before our command"),
        ("srun -n 2 python train_net_baseline.py", None, "srun -n 2: for the launcher"),
    ],
)
def test_what_starts_the_script_is_no_flag_of_it(start: str, processes: int | None, notice: str) -> None:
    found = ifam.translate(f"{start} --num_parts=4 --lr=1e-5")
    assert found.overrides.get("config.DISTRIBUTED.NUM_PROC_PER_NODE") == processes
    assert found.overrides["config.MODEL.PARTS.NUM_PARTS"] == 4
    assert found.overrides["config.MODEL.NAME"] == ("pooled" if "baseline" in start else "two_stage")
    assert any(notice in line for line in found.notices)


def test_evaluation_takes_the_best_save_of_a_folder() -> None:
    found = ifam.translate("train_net.py --eval_only --snapshot_dir runs/a --array_training_job --seed 3")
    assert found.overrides["config.MODEL.WEIGHTS_INIT.PARAMS_FILE"] == "runs/a/3/snapshot_best.pt"
    assert found.overrides["config.MODEL.WEIGHTS_INIT.PRESET"] == "ifam" and "config.RUN.DIR" not in found.overrides
    trained = ifam.translate("train_net.py --snapshot_dir runs/a").overrides
    assert trained["config.RUN.DIR"] == "runs/a" and "config.MODEL.WEIGHTS_INIT.PRESET" not in trained


def test_chest_radiographs_have_their_own_transforms_whatever_the_flag_says() -> None:
    asked = ifam.translate("train_net.py --dataset siim_acr --augmentations_to_use siim_acr").overrides
    assert asked == ifam.translate("train_net.py --dataset siim_acr").overrides
    assert asked["config.DATA.TRAIN.TRANSFORMS"][0] == {"name": "Resize", "size": [448, 448]}


def test_a_command_of_pdiscoformer_is_recognised() -> None:
    text = "train_net.py --modulation_type layer_norm --modulation_orth --freeze_params"
    assert any("--script train_net_pdisco" in line for line in ifam.translate(text).notices)
    found = ifam.translate(text, script="train_net_pdisco")
    assert not any("--script" in line for line in found.notices)
    assert found.overrides["config.MODEL.NAME"] == "parts" and not found.without


def test_an_ignored_split_is_said() -> None:
    notices = ifam.translate("train_net.py --train_split 0.8 --eval_mode test").notices
    assert any("--train_split 0.8: the original reads it and trains on all images" in line for line in notices)


#: Flags that become no option, in any script.
WITHOUT = {
    *("use_zero", "resplit", "recount", "shear_x", "shear_y", "scheduler_restart_factor", "cosine_cycle_limit"),
    *("model_ema_force_cpu", "metadata_path", "species_id_to_name_file", "turn_on_mixup_or_cutmix", "resume_training"),
}
#: And in one that does not have them.
OF_SINGLE = {"gumbel_softmax_hard", "modulation_type", "modulation_orth", "classifier_type", "noise_variance"}
OF_TIMM = {"augmentations_to_use", "aa", "color_jitter", "train_interpolation", "reprob", "remode"}
MASKS = {"mask_sub_path_train", "mask_sub_path_test"}
WITHOUT_IN = {
    "train_net": {"drop_path"} | OF_SINGLE | MASKS,
    "train_net_pdisco": {"drop_path_stage_1"} | MASKS,
    "train_net_baseline": {"drop_path_stage_1"} | OF_SINGLE | MASKS,
    "train_net_decoupled": {"drop_path_stage_1", "mask_sub_path"} | OF_SINGLE | OF_TIMM,
}


@pytest.mark.parametrize("script", ifam_flags.SCRIPTS)
def test_every_flag_becomes_an_option_or_is_said_to_have_none(script: str) -> None:
    found = {flag: ifam_table.effect(flag, script) for flag in ifam_flags.FLAGS}
    assert {flag for flag, (keys, _) in found.items() if not keys} == WITHOUT | WITHOUT_IN[script]
    silent = {flag for flag, (keys, reason) in found.items() if not keys and not reason}
    assert silent == {"resume_training"}  # a notice says that a run always goes on


@pytest.mark.parametrize(
    ("text", "flag", "said"),
    [
        ("train_net.py --dataset imagenet --image_sub_path_train a", "image_sub_path_train", "folders of its own"),
        ("train_net.py --dataset flowers102 --image_sub_path_test a", "image_sub_path_test", "folders of its own"),
        ("train_net.py --dataset siim_acr --hflip 0.1", "hflip", "no effect together with the other flags"),
        ("train_net.py --dataset waterbirds --train_split 0.5", "train_split", "CUB and NABirds only"),
        ("train_net_pdisco.py --freeze_params_stage_1 --freeze_params", "freeze_params_stage_1", "no effect"),
        ("train_net.py --dataset siim_acr --eval_mode val", "", "--eval_mode val: siim_acr has no validation images"),
        ("train_net.py --eval_mode worst_case", "", "--eval_mode worst_case: a part of Waterbirds; of cub all"),
    ],
)
def test_flags_that_others_make_void_are_said(text: str, flag: str, said: str) -> None:
    found = ifam.translate(text)
    assert list(found.without) == [flag] * bool(flag)
    assert said in found.without[flag] if flag else any(said in line for line in found.notices)
    assert not any("SUBSET" in key for key in found.overrides)


def test_scripts_whose_defaults_are_not_all_known_say_so() -> None:
    for script in ifam_flags.SCRIPTS[1:]:
        notices = ifam.translate("train.py --epochs 3", script=script).notices
        (line,) = [line for line in notices if "flags that are not given have defaults" in line]
        assert "--model_arch hf_hub:timm/" in line and "--epochs" not in line
        assert ("--lr " in line) == (script != "train_net_baseline")  # whose learning rate is known
    assert not any("have defaults" in line for line in ifam.translate("train_net.py").notices)


def test_lists_of_numbers_are_written_in_any_way() -> None:
    found = ifam.translate("train_net.py --cutmix_minmax 2e-1 .8 --intervention_fixed_part_id 1 2 --lr 1E-5").overrides
    assert found["config.DATA.MIX.CUTMIX_MINMAX"] == [0.2, 0.8]
    assert found["config.EVALUATE_PARTS.FIXED_PARTS"] == [1, 2]
    assert found["config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE"] == 1e-5


def test_the_table_says_of_every_flag_what_becomes_of_it() -> None:
    rows = {row.flag: row for row in ifam_table.rows()}
    assert {flag for flag, row in rows.items() if row.script == ifam_flags.TWO_STAGE} == set(PARSER.split())
    for row in rows.values():
        assert row.keys or row.note, row.flag
        assert len(row.ours) == len(row.keys), row.flag  # every key is an option
    assert rows["num_parts"].keys == ("config.MODEL.PARTS.NUM_PARTS",) and rows["num_parts"].original == 8
    assert rows["lr"].original == 1e-6 and rows["lr"].ours == (0.1,)
    assert not rows["shear_x"].keys and "never applies" in rows["shear_x"].note


def test_weights_of_each_script_have_names_of_their_own() -> None:
    text = "--dataset cub --data_path CUB --eval_only --snapshot_dir runs/snapshot_best.pt"
    found = {
        script: ifam.translate(text, script=script).overrides["config.MODEL.WEIGHTS_INIT.PRESET"]
        for script in ifam_flags.SCRIPTS
    }
    assert list(found.values()) == ["ifam", "pdiscoformer", "ifam_baseline", "ifam_decoupled"]


@pytest.mark.parametrize(("arch", "stride"), [("resnet50", 16), ("vit_small_patch14_dinov2", 32)])
def test_output_stride_is_for_cnns(arch: str, stride: int) -> None:
    found = ifam.translate(f"train_net_pdisco.py --model_arch {arch} --output_stride 16")
    assert found.overrides["config.MODEL.PARTS.OUTPUT_STRIDE"] == stride
    assert any("--output_stride" in notice for notice in found.notices) == (stride == 32)


def test_softmax_temperature_has_one_dash_or_two() -> None:
    for dashes in ("-", "--"):
        found = ifam.translate(f"train_net.py {dashes}softmax_temperature 0.5")
        assert found.overrides["config.MODEL.PARTS.SOFTMAX_TEMPERATURE"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_net.py --num_part 8", "did you mean 'num_parts'"),
        ("train_net.py --num_parts many", "--num_parts many: not a whole number"),
        ("train_net.py --dataset cubs", "did you mean 'cub'"),
        ("train_net.py --optimizer_type rms", "one of adam, adamw"),
        ("train_net.py 8", "'8' stands alone"),
        ("train_net.py --lr", "--lr needs a value"),
        ("train_net.py --gumbel_softmax=false", "--gumbel_softmax false: a switch, which takes no value"),
        ("train_net.py --wandb True", "Leave it out to have it off"),
        ("train_net.py --no-gumbel_softmax", "To have it off, leave --gumbel_softmax out"),
        ("train_net.py --epochs 1.5", "--epochs 1.5: not a whole number"),
        ("train_net.py --cutmix_minmax 1.2.3", "--cutmix_minmax 1.2.3: not a number"),
        ("train_net.py --cutmix_minmax=a", "--cutmix_minmax a: not a number"),
        ("train_net.py --averaging_type swa", "--averaging_type swa: ema, or leave it out"),
    ],
)
def test_what_cannot_be_translated(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ifam.translate(text)


@pytest.mark.parametrize("kind", ["lars", "nlars", "larc", "nlarc", "lamb", "lambc", "sgd", "nadam"])
def test_optimizers_compose(kind: str) -> None:
    found = ifam.translate(f"train_net.py --optimizer_type {kind} --data_path .")
    overrides = [word for word in found.words()[1:] if "DATA_PATHS" not in word]
    job = load_job([f"config={found.recipe}", *overrides]).job
    assert job.config.OPTIMIZER.NAME.removeprefix("timm/") in kind.replace("larc", "lars").replace("nlars", "lars")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translated")
    part_folders.write_birds(folder / "CUB_200_2011", train=128)
    part_folders.write_meta_shift(folder / "MetaDatasetCatDog", train=128)
    part_folders.write_siim_acr(folder / "siim-acr-pneumothorax-segmentation-data/versions/1", train=128)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_translated_commands_pass_a_dry_run(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ifam.translate(published(name, root))
    assert not found.without
    words = [word for word in found.words() if "RUN.DIR" not in word]
    code = main([*words, *SMALL[name], "config.RUN.DRY_RUN=true"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "Model (built without memory)" in out and "TRAIN: 128 images" in out
    assert "2.828e-06" in out


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (
            "train_net",
            "--augmentations_to_use timm --train_interpolation random --reprob 0.2 --cutmix 1 --averaging_type ema",
        ),
        ("train_net", "--optimizer_type lambc --use_soft_masks --use_amp --smoothing 0.1 --grad_accumulation_steps 2"),
        ("train_net_decoupled", "--late_masking"),
        ("train_net_baseline", "--pooling_type gap_cls --use_bce_loss"),
        ("train_net_pdisco", "--scheduler_type steplr --modulation_type layer_norm --modulation_orth --gumbel_softmax"),
        ("train_net_pdisco", "--model_arch resnet50 --use_torchvision_resnet_model"),
    ],
)
def test_other_scripts_and_settings_pass_a_dry_run(
    script: str, flags: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ifam.translate(
        f"{script}.py --data_path {shlex.quote(str(root / 'CUB_200_2011'))} --image_size 56 {flags}", script=script
    )
    trunk = [] if "resnet" in flags else [SMALL_TIMM]
    code = main([*found.words(), *trunk, "config.RUN.DRY_RUN=true"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "TRAIN: 115 images" in out  # 0.9 of 128


NASTY = (
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "a,b",
    "[a]",
    "{a: b}",
    "a=b",
    "a;b&c",
    "back\\slash",
    "!x",
    "nan",
    ".5",
    "True",
)


@pytest.mark.parametrize("name", NASTY)
def test_values_arrive_as_they_were(name: str) -> None:
    found = ifam.translate(f"train_net.py --group {shlex.quote(name)}")
    job = load_job([word for word in found.words() if "DATA_PATHS" not in word and "DATA_SOURCES" not in word]).job
    assert job.config.LOGGERS.WANDB.GROUP == name


def test_the_printed_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell that runs what the verb prints hands over the very words of the translation."""
    given = [
        "train_net.py",
        "--data_path",
        "my $data/it's [1]",
        "--group",
        'a "b" !x',
        "--num_parts",
        "4",
        "--shear_x",
        "1",
    ]
    assert main(["translate", "ifam", "--", *given]) == 0
    text = capsys.readouterr().out
    assert "# --shear_x: " in text
    program = tmp_path / "vissl-like"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == ifam.translate(shlex.join(given)).words()


def test_the_verb_tells_mistakes_like_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "--help"]) == 0 and "vissl-like translate SYSTEM" in capsys.readouterr().out
    assert main(["translate", "ifan", "--", "x"]) == 2 and "did you mean 'ifam'" in capsys.readouterr().err
    assert main(["config=debug/x", "translate"]) == 2
