"""The two commands of the ClusterFit page, as documented but for overrides that point at a small folder of photos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

from tests.integration.forks import Ended, run_ranks

NUM_CLUSTERS = 4


def _run(workdir: Path, *overrides: str, ranks: int = 1, expected: int = 0) -> Ended:
    """The command in forks; fresh processes are in test_launch.py and test_docs_run.py."""
    ended = run_ranks(overrides, cwd=workdir, ranks=ranks)
    for done in ended:
        assert done.returncode == expected, done.stdout[-4000:] + done.stderr[-4000:]
    return ended[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 crops of real photos in nested folders, JPEG and PNG."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        (folder / name).mkdir()
        for number in range(3):
            left, top = 40 * number, 20 * number
            crop = photo.crop((left, top, left + 180, top + 160))
            crop.save(folder / name / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-50 in the layout of a VISSL checkpoint."""
    torch.manual_seed(0)
    trunk = {f"_feature_blocks.{key}": value for key, value in resnet50().state_dict().items() if key[:2] != "fc"}
    nested = {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}}
    path = tmp_path_factory.mktemp("weights") / "rotnet.torch"
    torch.save(nested, path)
    return path


def _step1(workdir: Path, photos: Path, weights: Path, processes: int) -> Path:
    _run(
        workdir,
        "config=pretrain/clusterfit/cluster_features_resnet_8gpu_rotation_in1k",
        f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={weights}",
        f"config.DATA.TRAIN.DATA_PATHS=[{photos}]",
        f"config.CLUSTERFIT.NUM_CLUSTERS={NUM_CLUSTERS}",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4",
        "config.DATA.NUM_DATALOADER_WORKERS=0",
        f"config.DISTRIBUTED.NUM_PROC_PER_NODE={processes}",
        "config.MACHINE.DEVICE=cpu",
        ranks=processes,
    )
    return workdir / "runs/pretrain/clusterfit/cluster_features_resnet_8gpu_rotation_in1k/clusters"


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: Path) -> Path:
    return _step1(tmp_path_factory.mktemp("one_process"), photos, weights, 1)


def test_step_1_labels_every_image_in_data_set_order(clusters: Path, photos: Path) -> None:
    labels, images = np.load(clusters / "labels.npy"), np.load(clusters / "images.npy")
    expected = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*"))
    assert [str(image) for image in images] == expected
    assert labels.dtype == np.int64 and labels.shape == (12,)
    assert set(labels.tolist()) == set(range(NUM_CLUSTERS))
    assert (clusters / f"imagenet1k_train_res5_N{NUM_CLUSTERS}_D2048_labels.npy").exists()


def test_step_1_on_two_processes_writes_the_same_bytes(
    tmp_path: Path, clusters: Path, photos: Path, weights: Path
) -> None:
    twice = _step1(tmp_path, photos, weights, 2)
    name = f"imagenet1k_train_res5_N{NUM_CLUSTERS}_D2048"
    for file in ("labels.npy", "images.npy", f"{name}_labels.npy", f"{name}_centroids.npy"):
        assert (twice / file).read_bytes() == (clusters / file).read_bytes(), file


def test_step_2_trains_on_the_labels_of_step_1(tmp_path: Path, clusters: Path) -> None:
    _run(
        tmp_path,
        "config=pretrain/clusterfit/clusterfit_resnet_8gpu_imagenet",
        f"config.DATA.TRAIN.LABEL_PATHS=[{clusters / 'labels.npy'}]",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4",
        "config.DATA.NUM_DATALOADER_WORKERS=0",
        "config.DISTRIBUTED.NUM_PROC_PER_NODE=1",
        "config.MACHINE.DEVICE=cpu",
        "config.OPTIMIZER.NUM_EPOCHS=1",
        "config.LOG_FREQUENCY=1",
    )
    run_dir = tmp_path / "runs/pretrain/clusterfit/clusterfit_resnet_8gpu_imagenet"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert (run_dir / "checkpoints/last/model.safetensors").exists()
    from safetensors import safe_open

    with safe_open(run_dir / "checkpoints/last/model.safetensors", "pt") as file:
        assert file.get_slice("heads.0.clf.0.weight").get_shape() == [NUM_CLUSTERS, 2048]


def test_step_2_refuses_labels_of_other_images(tmp_path: Path, clusters: Path, photos: Path) -> None:
    """A folder with one photo more than the label file knows: an error that names it, not labels of the neighbours."""
    other = tmp_path / "photos"
    for path in photos.rglob("*.*"):
        target = other / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    Image.new("RGB", (32, 32)).save(other / "astronaut" / "extra.png")
    done = _run(
        tmp_path,
        "config=pretrain/clusterfit/clusterfit_resnet_8gpu_imagenet",
        f"config.DATA.TRAIN.LABEL_PATHS=[{clusters / 'labels.npy'}]",
        f"config.DATA.TRAIN.DATA_PATHS=[{other}]",
        "config.DATA.TRAIN.DATA_SOURCES=[disk_folder]",
        "config.DISTRIBUTED.NUM_PROC_PER_NODE=1",
        "config.OPTIMIZER.NUM_EPOCHS=1",
        expected=3,
    )
    assert "extra.png" in done.stderr
    assert "Traceback" not in done.stderr
