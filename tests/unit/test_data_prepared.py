"""What `vissl-like data VERB` makes of downloads: SIIM-ACR's folders, PartImageNet-OOD's split, drawn birds."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.part_folders import write_dicom
from vissl_like.config.schema_data import Data, Split, TrainSplit
from vissl_like.data import toybirds
from vissl_like.data.annotated import annotation
from vissl_like.data.cub import WaterbirdsSource
from vissl_like.data.dataset import build_dataset
from vissl_like.data.medical import SiimAcrSource, decode_mask, prepare, read_tubes
from vissl_like.data.part_sets import PartImageNetSource
from vissl_like.data.source import SourceRequest
from vissl_like.data.tools import main
from vissl_like.errors import ConfigError, DataError


def request(path: Path, split: str = "TRAIN", **options: Any) -> SourceRequest:
    return SourceRequest(split, 0, "", str(path), Split(**options), TrainSplit())


def test_siim_acr_from_the_download_to_images(tmp_path: Path) -> None:
    names = {"a": "-1", "b": "5 3", "c": "1024 2 1022 2", "d": "-1"}
    for number, name in enumerate(names):
        write_dicom(tmp_path / "dicom-images-train" / "x" / "y" / f"{name}.dcm", 10 * number)
    lines = [f"{name}, {runs}" for name, runs in names.items()] + ["b, 100 1"]
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\n" + "\n".join(lines) + "\n")
    with (tmp_path / "tubes.pkl").open("wb") as file:
        pickle.dump({"c": 0, "d": 0}, file)
    out = tmp_path / "out"
    counts = prepare(tmp_path, tmp_path / "tubes.pkl", out)
    assert counts == {"train_set": 2, "full_test_set": 2, "robust_test_set": 1, "non_robust_test_set": 1}
    train, robust = SiimAcrSource.build(request(out)), SiimAcrSource(out, folder="robust_test_set")
    assert train.paths.tolist() == ["train_set/0/a.dcm", "train_set/1/b.dcm"]
    assert robust.paths.tolist() == ["robust_test_set/1/c.dcm"] and robust.labels is not None
    assert np.asarray(robust.load(0))[0, 0].tolist() == [20, 20, 20]
    assert np.argwhere(annotation(train, "mask", 1)).tolist() == [[5, 0], [6, 0], [7, 0], [100, 0]]  # down the column
    assert np.argwhere(annotation(robust, "mask", 0)).tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    data = Data(
        TRAIN=Split(DATA_SOURCES=["siim_acr"], DATA_PATHS=[str(out)], TRANSFORMS=[{"name": "CenterCrop", "size": 8}])
    )
    assert build_dataset(data, "TRAIN", seed=0)[1]["data"].float().mean() == 10


def test_images_without_a_file_are_left_out_of_siim_acr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\na, -1\nb, 5 3\nc, -1\n")
    (tmp_path / "tubes.json").write_text('{"b": 1}')
    with pytest.raises(DataError, match="no DICOM file of any image"):
        prepare(tmp_path, tmp_path / "tubes.json", tmp_path / "out")
    write_dicom(tmp_path / "dicom-images-train" / "x" / "y" / "a.dcm", 1)
    assert prepare(tmp_path, tmp_path / "tubes.json", tmp_path / "out") == {"train_set": 1}
    assert "2 images are listed without a DICOM file and left out, the first is 'b'" in caplog.text


def test_masks_that_are_no_runs() -> None:
    for text in ("1 2 3", "1 -2", "2000000 5"):
        with pytest.raises(ValueError, match="pairs|ends at pixel"):
            decode_mask([text])
    assert not decode_mask([]).any()


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("harm",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tubes.pkl"
    file.write_bytes(pickle.dumps({"a": Harmful()}))
    with pytest.raises(DataError, match="Save it as JSON"):
        read_tubes(file)
    assert "harm" not in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("id,tube\na,1\nb,0\n")
    assert read_tubes(tmp_path / "t.csv") == {"a": 1, "b": 0}


def test_the_command_line_draws_and_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = functools.partial(toybirds.write_waterbirds, counts=(8, 4, 4))
    monkeypatch.setattr(toybirds, "write_waterbirds", few)
    assert main(["toy_waterbirds", str(tmp_path / "toy"), "--size", "16"]) == 0
    assert len(WaterbirdsSource(tmp_path / "toy", split="TRAIN")) == 8
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        main(["toybirds", str(tmp_path / "toy")])
    with pytest.raises(ConfigError, match="--size -5: a bird needs at least 16 pixels"):
        main(["toybirds", str(tmp_path / "small"), "--size", "-5"])
    with pytest.raises(ConfigError, match="did you mean 'toybirds'"):
        main(["toybird", str(tmp_path)])
    with pytest.raises(ConfigError, match="required: TUBES, DST"):
        main(["siim_acr", str(tmp_path)])
    assert main([]) == 0 and "siim_acr" in capsys.readouterr().out


def test_part_imagenet_ood_cuts_the_training_annotations_in_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["n01440764_1", "n01443537_2", "n01440764_3", "n01443537_4"]
    content = {
        "images": [
            {"id": 10 + i, "file_name": f"{name}.JPEG", "height": 9, "width": 9} for i, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "Fish Head"}],
        "annotations": [
            {
                "id": i,
                "image_id": 10 + i,
                "category_id": 1,
                "area": 9,
                "segmentation": [[i, 0, 3, 3]],
                "bbox": [i, 0, 3, 3],
            }
            for i in range(4)
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    titles = "image_id\tis_test\tlabel_id\tlabel_name\timage_name\n"
    lines = [f"{i}\t{i // 2}\t{i % 2}\tgreat fish\t{n[:9]}/{n}.JPEG\n" for i, n in enumerate(names)]
    for start in (titles, ""):
        (tmp_path / "split.txt").write_text(start + "".join(lines))
        words = [str(tmp_path / "train.json"), str(tmp_path / "split.txt"), str(tmp_path / "out")]
        assert main(["part_imagenet_ood", *words]) == 0
        assert "2 images in train_train.json, 2 images in train_test.json" in capsys.readouterr().out
    (tmp_path / "out" / "n01440764").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "n01440764" / "n01440764_3.JPEG")
    test = PartImageNetSource.build(request(tmp_path / "out", "TEST", ANNOTATION_PATH="train_test.json"))
    assert test.paths.tolist() == ["n01440764/n01440764_3.JPEG", "n01443537/n01443537_4.JPEG"]
    assert [np.argwhere(test.mask(row)).min(axis=0).tolist() for row in (0, 1)] == [[0, 2], [0, 3]]
    written = json.loads((tmp_path / "out" / "train_test.json").read_text())
    assert [image["id"] for image in written["images"]] == [0, 1]
    for text, message in (
        ("0\t2\t0\ta\tn1.JPEG\n", r"split.txt, line 1: is_test is '2'"),
        ("0\t1\t0\n", r"split.txt, line 1: .* has 3 fields"),
        ("0\t1\t0\ta\tn1.JPEG\n", r"train.json: has no image 'n1', which .*split.txt lists"),
    ):
        (tmp_path / "split.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            main(["part_imagenet_ood", *words])
