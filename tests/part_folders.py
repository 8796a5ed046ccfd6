"""Small folders with the layouts of the annotated data sets: CUB with Waterbirds in it, MetaShift, SIIM-ACR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vissl_like.data import toybirds


def write_birds(folder: Path, *, train: int, test: int = 8, size: int = 32) -> Path:
    """CUB's layout (toy birds), and Waterbirds' folder inside."""
    toybirds.write_cub(folder, train=train, test=test, size=size)
    toybirds.write_waterbirds(folder, counts=(train, 4, test), size=size)
    return folder


def write_meta_shift(folder: Path, *, train: int, test: int = 4) -> Path:
    """MetaShift's cats and dogs, in colours."""
    contexts = {"train": ("cat/cat(sofa)", "dog/dog(bench)"), "test": ("cat/cat(shelf)", "dog/dog(shelf)")}
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            file = folder / split / contexts[split][i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (i % 256, 100, 200)).save(file)
    return folder


def write_siim_acr(folder: Path, *, train: int, test: int = 4) -> Path:
    """SIIM-ACR as its preparation leaves it: radiographs as DICOM, masks as PNG."""
    for split, count in (("train_set", train), ("full_test_set", test)):
        for i in range(count):
            write_dicom(folder / split / str(i % 2) / f"{split}_{i}.dcm", i % 256)
            mask = folder / "all_masks" / f"{split}_{i}.png"
            mask.parent.mkdir(exist_ok=True)
            Image.new("L", (16, 16), 255 * (i % 2)).save(mask)
    return folder


def write_dicom(file: Path, value: int) -> None:
    """A grey radiograph of 16 x 16 pixels."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    image = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.Rows = image.Columns = 16
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    image.PixelData = np.full((16, 16), value, np.uint8).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(file, enforce_file_format=True)
