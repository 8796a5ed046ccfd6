"""From JPEG files to samples: ours, Pillow with torchvision v1 (VISSL's way), timm's loader transform, and decoding alone.

    python benchmarks/jpeg.py              all of these
    python benchmarks/jpeg.py --small      224 px RandomResizedCrop and flip on 500x375 photos
    python benchmarks/jpeg.py --large      Resize and CenterCrop on 2000x1500 photos
    python benchmarks/jpeg.py --handover   finished images from a loader process: our loader, uint8, against float32
    python benchmarks/jpeg.py --augment    colour and blur in the loader against on the device (here: the CPU)
    python benchmarks/jpeg.py --workers 1,2,4 --kind threads      how loading grows with threads, or with processes

What --small and --large measure is the work of a loader process for a batch: read, decode, transform, stack. One thread,
CPU seconds; the variants take turns on the same batch of files in shuffled order, and the ratios of a batch are compared,
since the speed of a shared machine drifts. --handover adds up the CPU seconds of both processes; --workers measures wall
time. Photos are made from those in scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg
import torch
from _rounds import in_words, ratios, run_parts, turns, verdict
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.core import rng
from vissl_like.data.dataset import build_dataset
from vissl_like.data.images import ImageDataset, Sample
from vissl_like.data.loader import _read_batch, close_workers, row_batches

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
V1 = "Pillow + torchvision v1"
TAIL: list[dict[str, Any]] = [{"name": "ToTensor"}, {"name": "Normalize", "mean": MEAN, "std": STD}]
TRAIN: list[dict[str, Any]] = [{"name": "RandomResizedCrop", "size": 224}, {"name": "RandomHorizontalFlip"}]
TEST: list[dict[str, Any]] = [{"name": "Resize", "size": 256}, {"name": "CenterCrop", "size": 224}]
SIMCLR: list[dict[str, Any]] = [
    *TRAIN,
    {"name": "ImgPilColorDistortion", "strength": 1.0},
    {"name": "ImgPilGaussianBlur", "p": 0.5},
]
#: From the numbers of some files to a batch.
Call = Callable[[Sequence[int]], Any]


# ---------------------------------------------------------------------------------------------- photos
def originals() -> list[Image.Image]:
    """Some photographs that come with scikit-image and scikit-learn."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field")
    arrays = [getattr(data, name)() for name in names] + list(load_sample_images().images)
    return [Image.fromarray(np.ascontiguousarray(array[..., :3])) for array in arrays]


def write_photos(folder: Path, *, count: int, size: tuple[int, int]) -> None:
    """JPEGs of quality 90, 4:2:0: parts of the photographs, mirrored, brighter or darker, with noise of sigma 2 to 6."""
    numbers, sources = np.random.default_rng(0), originals()
    width, height = size
    for row in range(count):
        source = sources[row % len(sources)]
        wide = min(source.width, source.height * width / height) * numbers.uniform(0.6, 1.0)
        high = wide * height / width
        left, top = numbers.uniform(0, source.width - wide), numbers.uniform(0, source.height - high)
        part = source.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
        pixels = np.asarray(part, dtype=np.float32)[:, :: 1 if numbers.random() < 0.5 else -1]
        noisy = pixels * numbers.uniform(0.8, 1.2) + numbers.normal(0, numbers.uniform(2, 6), pixels.shape)
        file = folder / f"class_{row % 8}" / f"{row:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, quality=90, subsampling="4:2:0")


def dataset(folder: Path, transforms: list[dict[str, Any]], **options: Any) -> ImageDataset:
    """What the program itself builds."""
    split = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(folder)], "TRANSFORMS": [*transforms, *TAIL]}
    return build_dataset(Data(TRAIN=split, **options), "TRAIN", seed=0)


# -------------------------------------------------------------------------------------------- variants
def ours(data: ImageDataset) -> Call:
    """What our loader process does, uint8, with everything that belongs to it (seeding, replacement of bad images)."""
    return lambda rows: _read_batch(data, 1, np.asarray(rows))


def unstacked(data: ImageDataset) -> Call:
    """The same without the stacking."""
    return lambda rows: data.samples(1, rows)


def by_torchvision(files: Sequence[str], *, is_training: bool, is_stacked: bool = True) -> Call:
    """Pillow and torchvision v1, float32 and normalised: the way of VISSL."""
    from torchvision import transforms as v1

    steps = (
        [v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()] if is_training else [v1.Resize(256), v1.CenterCrop(224)]
    )
    transform = v1.Compose([*steps, v1.ToTensor(), v1.Normalize(MEAN, STD)])
    stack = torch.utils.data.default_collate if is_stacked else list
    return lambda rows: stack([transform(open_rgb(files[row])) for row in rows])


def by_timm(files: Sequence[str], *, is_training: bool) -> Call:
    """timm's transform and collate function for its own loader: bilinear, uint8; it normalises on the device."""
    from timm.data import create_transform
    from timm.data.loader import fast_collate

    options: dict[str, Any] = {"color_jitter": None} if is_training else {"crop_pct": 224 / 256}
    transform = create_transform(
        224, is_training=is_training, use_prefetcher=True, interpolation="bilinear", mean=MEAN, std=STD, **options
    )
    return lambda rows: fast_collate([(transform(open_rgb(files[row])), 0) for row in rows])


def open_rgb(file: str) -> Image.Image:
    """As torchvision's folder does."""
    with open(file, "rb") as stream:
        return Image.open(stream).convert("RGB")


def decoded(files: Sequence[str]) -> Call:
    """The limit: read and decode, nothing else."""

    def decode(rows: Sequence[int]) -> None:
        for row in rows:
            with open(files[row], "rb") as stream:
                simplejpeg.decode_jpeg(stream.read(), "RGB")

    return decode


# ------------------------------------------------------------------------------------------- measuring
def cpu_seconds(call: Call, rows: Sequence[int]) -> float:
    """Per image."""
    began = time.process_time()
    call(rows)
    return (time.process_time() - began) / len(rows)


def batches_of(variants: dict[str, Call], *, rows: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds per image of each variant, one number for each batch."""
    for call in variants.values():  # imports, buffers and caches
        call(range(min(batch, rows)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number, name in turns(variants, rounds=rounds):
        chosen = [(number * batch + k) % rows for k in range(batch)]
        seconds[name].append(cpu_seconds(variants[name], chosen))
    return seconds


def show(seconds: dict[str, list[float]], *, base: str, goals: Sequence[tuple[str, str, float]] = ()) -> None:
    """A line for each variant, and one for each goal: (faster, slower, factor)."""
    print(f"{'':<36}{'images/s':>9}   x {base} (quartiles)")
    for name, values in seconds.items():
        print(f"{name:<36}{1 / statistics.median(values):9.0f}   {in_words(ratios(seconds, base, name))}")
    for fast, slow, factor in goals:
        found = ratios(seconds, slow, fast)
        print(f"goal: {fast} >= {factor:g} x {slow}: {in_words(found)}, {verdict(statistics.median(found) >= factor)}")


def differences(data: ImageDataset, rows: Sequence[int]) -> list[float]:
    """Of each image, ours against the same transforms on Pillow's image with the same random numbers, of 255."""
    found = []
    for row in rows:
        with rng.sample_scope(0, 1, row):
            expected, _ = data.views(data.image(row))
        found.append((data.sample(1, row).data.float() - expected.float()).abs().mean().item())
    return found


def show_differences(what: str, found: list[float], *, goal: float = 0.0) -> None:
    """Their mean, which is to be at most `goal` where there is one, and the largest."""
    mean = statistics.mean(found)
    print(f"{what}: mean {mean:.4f}, largest of an image {max(found):.4f} (of 255, {len(found)} images)")
    if goal:
        print(f"goal: mean difference <= {goal:g} of 255: {mean:.4f}, {verdict(mean <= goal)}")


# ----------------------------------------------------------------------------------------- comparisons
def small(folder: Path, arguments: argparse.Namespace) -> None:
    """The training transform."""
    write_photos(folder, count=arguments.photos, size=(500, 375))
    data = dataset(folder, TRAIN)
    files = [str(data.file(row)) for row in range(len(data))]
    variants = {
        "ours": ours(data),
        V1: by_torchvision(files, is_training=True),
        "timm": by_timm(files, is_training=True),
        "ours, not stacked": unstacked(data),
        f"{V1}, not stacked": by_torchvision(files, is_training=True, is_stacked=False),
        "decoding alone": decoded(files),
    }
    seconds = batches_of(variants, rows=len(files), batch=50, rounds=arguments.rounds)
    show(seconds, base=V1, goals=[("ours", V1, 2.2), ("ours", "timm", 1.6)])
    print("not stacked:", in_words(ratios(seconds, f"{V1}, not stacked", "ours, not stacked")))
    show_differences("difference to Pillow", differences(data, range(min(60, len(files)))), goal=0.1)


def large(folder: Path, arguments: argparse.Namespace) -> None:
    """The test transform on large photos."""
    write_photos(folder, count=16, size=(2000, 1500))
    data, reduced = dataset(folder, TEST), dataset(folder, TEST, REDUCED_DECODE=True)
    files = [str(data.file(row)) for row in range(len(data))]
    variants = {
        "ours": ours(data),
        "ours, REDUCED_DECODE": ours(reduced),
        V1: by_torchvision(files, is_training=False),
        "timm": by_timm(files, is_training=False),
        "decoding alone": decoded(files),
    }
    seconds = batches_of(variants, rows=len(files), batch=8, rounds=arguments.rounds)
    show(seconds, base=V1, goals=[("ours", V1, 3.0), ("ours, REDUCED_DECODE", V1, 3.0)])
    show_differences("difference to Pillow", differences(data, range(len(files))))
    show_differences("with REDUCED_DECODE", differences(reduced, range(len(files))), goal=0.5)
    random_crops = dataset(folder, TRAIN, REDUCED_DECODE=True)
    show_differences("with REDUCED_DECODE and random crops", differences(random_crops, range(len(files))))


class Finished(ImageDataset):
    """Images that are finished: what is left is to put a batch together, and its way to the training."""

    pixels = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8)

    def samples(self, epoch: int, rows: Sequence[int] | np.ndarray, *, out: torch.Tensor | None = None) -> list[Sample]:
        """Each is copied to its place in the batch, where the crop of a decoded one would write it."""
        assert out is not None
        for slot in out:
            slot.copy_(self.pixels)
        places = out.permute(0, 3, 1, 2)
        return [Sample(data, self._label(int(row)), int(row), {}, self.views.draw()) for data, row in zip(places, rows)]


class Ready(torch.utils.data.Dataset):
    """The same image and a label, as most programs hand them to PyTorch's own DataLoader."""

    def __init__(self, image: torch.Tensor) -> None:
        self._image = image

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self._image, 0


def ordinary(image: torch.Tensor, *, rows: range, batch: int) -> Iterable[Any]:
    """A DataLoader with one process that stays alive, as ours does."""
    return torch.utils.data.DataLoader(
        Ready(image),
        batch_size=batch,
        sampler=rows,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )


def cpu_of_all() -> float:
    """CPU seconds so far of this process and of those that it started and that are alive."""
    children = (process.pid for process in multiprocessing.active_children())
    clocks = [~pid << 3 | 2 for pid in children if pid is not None]  # how Linux numbers the clock of another process
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def handover(folder: Path, arguments: argparse.Namespace) -> None:
    """From finished images in a loader process to batches in the training."""
    write_photos(folder, count=8, size=(64, 48))
    data, rows, batch = dataset(folder, TRAIN), range(64 * 30), 64
    finished = Finished(data.source, views=data.views, labels=None, split="TRAIN", name="finished", seed=0)
    of_batches = [np.asarray(rows[start : start + batch]) for start in rows[::batch]]
    image = finished.pixels.permute(2, 0, 1).contiguous()
    plain = {
        kind: ordinary(one, rows=rows, batch=batch) for kind, one in (("uint8", image), ("float32", image.float()))
    }
    passes: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
        "ours": lambda: (found["data"] for found in row_batches(finished, of_batches, workers=1)),
        "DataLoader, uint8": lambda: (images for images, _ in plain["uint8"]),
        "DataLoader, float32": lambda: (images for images, _ in plain["float32"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number, name in turns(passes, rounds=arguments.rounds + 1):
        began = cpu_of_all() if number else 0.0  # in the first round the processes start
        for images in passes[name]():
            images[0, 0, 0, 0].item()
        if number:
            seconds[name].append((cpu_of_all() - began) / len(rows))
    close_workers(finished)
    show(seconds, base="DataLoader, float32", goals=[("ours", "DataLoader, float32", 3.0)])


def workers(folder: Path, arguments: argparse.Namespace) -> None:
    """Images per second by threads of this process and by loader processes, which only hand the batches over."""
    write_photos(folder, count=arguments.photos, size=(500, 375))
    data, batch = dataset(folder, TRAIN), 32
    batches = [np.arange(number * batch, (number + 1) * batch) % len(data) for number in range(24)]
    read = functools.partial(_read_batch, data, 0)

    def by_threads(pool: ThreadPoolExecutor) -> Iterable[Any]:
        return pool.map(read, batches)

    def by_processes(count: int) -> Iterable[Any]:
        return row_batches(data, batches, workers=count)

    given = arguments.workers or [1, 2, 4]
    passes: dict[str, Callable[[], Iterable[Any]]] = {}
    for count in given:
        if arguments.kind != "processes":
            passes[f"threads: {count}"] = functools.partial(by_threads, ThreadPoolExecutor(count))
        if arguments.kind != "threads":
            passes[f"processes: {count}"] = functools.partial(by_processes, count)
    wall: dict[str, list[float]] = {name: [] for name in passes}
    cpu: dict[str, list[float]] = {name: [] for name in passes}
    for number, name in turns(passes, rounds=arguments.rounds + 1):
        began = time.perf_counter(), cpu_of_all()
        for _ in passes[name]():
            pass
        if number:  # in the first round threads and processes start
            wall[name].append((time.perf_counter() - began[0]) / (batch * len(batches)))
            cpu[name].append((cpu_of_all() - began[1]) / (batch * len(batches)))
    close_workers(data)
    show(wall, base=next(iter(passes)))
    for name, values in cpu.items():
        print(f"{name:<36}{1000 * statistics.median(values):9.2f} ms of CPU time per image")
    for count in given if arguments.kind is None else []:
        threads, processes = f"threads: {count}", f"processes: {count}"
        speed, work = ratios(wall, processes, threads), ratios(cpu, threads, processes)
        print(f"{count}: images/s, threads / processes {in_words(speed)}; CPU time {in_words(work)}")


def augment(folder: Path, arguments: argparse.Namespace) -> None:
    """SimCLR's transforms in the loader on PIL images, and on batches on the device, which is this CPU here."""
    write_photos(folder, count=64, size=(500, 375))
    loader, device = (dataset(folder, SIMCLR, AUGMENT_ON_DEVICE=flag) for flag in (False, True))
    batch = _read_batch(device, 1, np.arange(64))
    plain, draws = torch.as_tensor(batch["data"]), torch.from_numpy(batch["draws"])
    variants = {
        "loader: all": ours(loader),
        "loader: crop and flip": ours(device),
        "device: normalise": lambda rows: loader.device_transform(plain[rows]),
        "device: colour, blur, normalise": lambda rows: device.device_transform(plain[rows], draws[rows]),
    }
    show(batches_of(variants, rows=64, batch=32, rounds=arguments.rounds), base="loader: all")


#: What can be chosen by a flag of that name, in the order in which all of it runs.
PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "small": small,
    "large": large,
    "handover": handover,
    "augment": augment,
    "workers": workers,
}


def counts(text: str) -> list[int]:
    """1,2,4 as numbers."""
    return [int(count) for count in text.split(",")]


def in_a_folder(part: Callable[[Path, argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        part(Path(folder), arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name in list(PARTS)[:-1]:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--workers", type=counts, nargs="?", const="1,2,4", help="how many threads or processes: 1,2,4")
    parser.add_argument("--kind", choices=("threads", "processes"), help="of --workers; default: both")
    parser.add_argument("--photos", type=int, default=500, help="how many small photos")
    parser.add_argument("--rounds", type=int, default=10, help="blocks to measure")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    run_parts({name: functools.partial(in_a_folder, part, arguments) for name, part in PARTS.items()}, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
