"""Command lines of iFAM in our words: every flag, every typing error of its documentation."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vissl_like.compat import ifam, ifam_flags
from vissl_like.config.check import load_job
from vissl_like.data import toybirds
from vissl_like.errors import ConfigError
from vissl_like.launch.main import main

#: The commands of the document, typing errors included.
MODEL = r"""
--model_arch hf_hub:timm/vit_base_patch14_reg4_dinov2.lvd142m /
--pretrained_start_weights /
--batch_size 16 --wandb --epochs 90 --save_every_n_epochs <duration at which to save checkpoints> \
--num_workers 2 --wandb_entity <wandb username> --wandb_mode <online/offline> --snapshot_dir <path to save directory> \
--lr 2.828e-6 --optimizer_type adamw --scheduler_type cosine --scratch_lr_factor 1e4 --augmentations_to_use cub_original \ \
--num_parts 8 --weight_decay 0.05 --freeze_backbone --enforced_presence_loss 2 --gumbel_softmax --grad_norm_clip 2.0
"""
START = "torchrun --nnodes=1 \\\n--nproc_per_node=8 \\\n<base path to the code>/train_net.py "
CUB = START + "--data_path {root} --dataset cub --train_split 1 --eval_mode test --image_size 56 " + MODEL
COMMANDS = {
    "cub": CUB,
    "waterbirds": CUB.replace("--dataset cub", "--dataset waterbirds --image_sub_path_train " + toybirds.WATERBIRDS)
    + " --image_sub_path_test " + toybirds.WATERBIRDS,
}  # fmt: skip


def test_the_documents_command() -> None:
    found = ifam.translate(COMMANDS["cub"].replace("{root}", "<base path to dataset>/CUB_200_2011"))
    assert found.overrides["config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE"] == 2.828e-6
    assert found.overrides["config.OPTIMIZER.PARTS.SCRATCH_LR_FACTOR"] == 1e4
    assert found.overrides["config.DISTRIBUTED.NUM_PROC_PER_NODE"] == 8
    assert found.overrides["config.MODEL.PARTS.FREEZE_BACKBONE"] is True
    assert found.overrides["config.DATA.TRAIN.DATA_PATHS"] == ["<base_path_to_dataset>/CUB_200_2011"]
    assert sum("typing error" in line for line in found.notices) == 3
    assert any("save_every_n_epochs" in line and "placeholder" in line for line in found.notices)
    assert not found.without


def test_every_flag_becomes_something_or_is_said_to_have_no_counterpart() -> None:
    for flag, (kind, default) in ifam_flags.FLAGS.items():
        value = {bool: "", list: " 1 2", int: " 3", float: " 0.5", str: f" {default or 'word'}"}[kind]
        for script in ifam_flags.SCRIPTS:
            found = ifam.translate(f"train.py --{flag}{value}", script=script)
            plain = ifam.translate("train.py", script=script)
            said = flag in found.without or any(flag in line for line in found.notices)
            assert said or found.overrides.keys() >= plain.overrides.keys(), (flag, script)


def test_softmax_temperature_has_one_dash_or_two() -> None:
    for dashes in ("-", "--"):
        found = ifam.translate(f"train_net.py {dashes}softmax_temperature 0.5")
        assert found.overrides["config.MODEL.PARTS.SOFTMAX_TEMPERATURE"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_net.py --num_part 8", "did you mean 'num_parts'"),
        ("train_net.py --num_parts many", "--num_parts many: not a number"),
        ("train_net.py --dataset cubs", "did you mean 'cub'"),
        ("train_net.py --optimizer_type rms", "one of adam, adamw"),
        ("train_net.py 8", "'8' stands alone"),
        ("train_net.py --lr", "--lr needs a value"),
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
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translated") / "CUB_200_2011"
    toybirds.write_cub(folder, train=160, test=16, size=56)
    toybirds.write_waterbirds(folder, counts=(160, 4, 4), size=56)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_translated_commands_pass_a_dry_run(name: str, birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ifam.translate(COMMANDS[name].replace("{root}", shlex.quote(str(birds))))
    words = [word for word in found.words() if "RUN.DIR" not in word]
    small = "config.MODEL.TRUNK.OPTIONS={embed_dim:48,depth:2,num_heads:4}"
    code = main([*words, small, "config.RUN.DRY_RUN=true", "config.DISTRIBUTED.NUM_PROC_PER_NODE=1"])
    assert code == 0, capsys.readouterr().err
    assert "Model (built without memory)" in capsys.readouterr().out
