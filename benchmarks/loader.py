"""Images per second of the ImageNet pipeline, and where the time goes, on made-up photographs.

Both tars are made anew, with JPEGs of 400 x 500 pixels (and once of 1600 x 2000) whose amplitudes
fall with frequency as those of photographs do. Then, all on this machine:

* each stage of one image, in processor time of one thread: what a core can do at most;
* the same with averaging instead of reduced decoding, and Pillow's way, for comparison, each with
  its mean difference from an image that is decoded whole and resized with antialiasing;
* batches as a training loop gets them, with threads, processes and a cache of smaller images: in
  time that passes, so nothing else may run.

    python benchmarks/loader.py [--quick] [--seconds 5] [--json results.json]
"""

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from jaxprune import reports
from jaxprune.data import imagenet
from jaxprune.data import imagenet_augment as augment

CLASSES = 4
STAGES = ("read", "size, box", "decode", "cut, resize, mirror")


def photograph(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A JPEG with about as many bytes as ImageNet's have."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])[..., None]
    noise = rng.normal(size=(height, width, 1)) + 0.3 * rng.normal(size=(height, width, 3))
    noise = np.fft.rfft2(noise, axes=(0, 1)) / np.maximum(frequency, 1 / 500) ** 1.3
    pixels = np.fft.irfft2(noise, (height, width), axes=(0, 1))
    pixels = np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def make_images(folder: Path, height: int, width: int, count: int) -> imagenet.Images:
    """Training images in tars of the real layout."""
    rng, classes = np.random.default_rng(0), [f"n{label:08d}" for label in range(CLASSES)]

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))

    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for wnid in classes:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(count // CLASSES):
                    add(tar, f"{wnid}_{i}.JPEG", photograph(rng, height, width))
            add(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        add(tar, "ILSVRC2012_val_00000001.JPEG", photograph(rng, height, width))
    contents = imagenet.Contents(tuple(classes), (classes[0],), count)
    return imagenet.load(folder, data_dir=folder, contents=contents).train


def rounds(seconds: float) -> Iterator[int]:
    """0, 1, 2, ... until the time is over; at least once."""
    until, number = time.perf_counter() + seconds, 0
    while not number or time.perf_counter() < until:
        yield number
        number += 1


def stages(images: imagenet.Images, size: int, seconds: float) -> list[dict[str, Any]]:
    """Microseconds of processor time of each stage of a training image, in one thread."""
    augment.one_thread()
    out, spent, done = np.zeros((size, size, 3), np.uint8), np.zeros(len(STAGES)), 0
    for step in rounds(seconds):
        for index, draws in enumerate(augment.random_draws(0, step, len(images)).tolist()):
            clock = [time.thread_time()]
            data = images.read(index)
            clock.append(time.thread_time())
            full = augment.full_size(data)
            assert full is not None
            box = augment.random_box(*full, draws)
            clock.append(time.thread_time())
            pixels, reduction = augment.decode_for(data, full, min(box.height, box.width), size)
            assert pixels is not None
            clock.append(time.thread_time())
            augment.cut_out(pixels, box, reduction, draws[-1] >= 0.5, out)
            clock.append(time.thread_time())
            spent += np.diff(clock)
            done += 1
    each = 1e6 * spent / done
    return [
        {"stage": name, "us": us, "share": us / each.sum()}
        for name, us in zip((*STAGES, "all"), (*each, each.sum()), strict=True)
    ]


def antialiased(data: bytes, box: augment.Box, size: int) -> np.ndarray:
    """Decoded whole and resized by Pillow: as torchvision does it."""
    top, left, height, width = box
    region = (left, top, left + width, top + height)
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, region)
    return np.asarray(resized)


def whole(data: bytes, box: augment.Box, size: int, interpolation: int) -> np.ndarray:
    """Decoded whole and resized by OpenCV."""
    pixels, (top, left, height, width) = augment.decode(data), box
    assert pixels is not None
    part = pixels[top : top + height, left : left + width]
    return cv2.resize(part, (size, size), interpolation=interpolation)


def reduced(data: bytes, box: augment.Box, size: int) -> np.ndarray:
    """What the pipeline does."""
    out, full = np.zeros((size, size, 3), np.uint8), augment.full_size(data)
    assert full is not None
    pixels, reduction = augment.decode_for(data, full, min(box.height, box.width), size)
    assert pixels is not None
    augment.cut_out(pixels, box, reduction, False, out)
    return out


WAYS: dict[str, Callable[[bytes, augment.Box, int], np.ndarray]] = {
    "reduced, linear (ours)": reduced,
    "whole, linear": lambda data, box, size: whole(data, box, size, cv2.INTER_LINEAR),
    "whole, averaged": lambda data, box, size: whole(data, box, size, cv2.INTER_AREA),
    "Pillow, antialiased": antialiased,
}


def ways(images: imagenet.Images, size: int, seconds: float) -> list[dict[str, Any]]:
    """Processor time and difference of each way to decode and resize the same boxes, in turns."""
    augment.one_thread()
    encoded = [images.read(index) for index in range(len(images))]
    spent, errors, done = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0.0), 0
    for step in rounds(seconds):
        for data, draws in zip(encoded, augment.random_draws(1, step, len(images)), strict=True):
            full = augment.full_size(data)
            assert full is not None
            box = augment.random_box(*full, draws.tolist())
            results = {}
            for name, way in WAYS.items():
                clock = time.thread_time()
                results[name] = way(data, box, size).astype(np.int16)
                spent[name] += time.thread_time() - clock
            for name, result in results.items():
                errors[name] += float(np.abs(result - results["Pillow, antialiased"]).mean())
            done += 1
    return [
        {"way": name, "us": 1e6 * spent[name] / done, "difference": errors[name] / done}
        for name in WAYS
    ]


def throughput(
    images: imagenet.Images, size: int, batch_size: int, seconds: float, **options: int
) -> float:
    """Images per second that a loop gets which does nothing else."""
    with imagenet.train_batches(images, batch_size, seed=0, image_size=size, **options) as batches:
        # What was made ahead of time must not count: one batch of each maker, and those it keeps.
        for _ in range(3 * max(1, options.get("workers", 0)) * options["threads"]):
            next(batches)
        began, done = time.perf_counter(), 0
        for _ in rounds(seconds):
            next(batches)
            done += batch_size
        return done / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--json", help="also write the records to this file")
    arguments = parser.parse_args()
    seconds, cores = arguments.seconds, os.cpu_count() or 1
    count, sides, size, batch_size = 256, {"": (400, 500), ", large": (1600, 2000)}, 224, 64
    if arguments.quick:
        seconds, count, size, batch_size = 0.0, 8, 32, 4
        sides = {"": (80, 100), ", large": (160, 200)}
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width) in sides.items():
            own = Path(folder) / f"{height}"
            few = count if not name else max(CLASSES, count // 16)
            images = make_images(own, height, width, few)
            record[f"stages{name}"] = stages(images, size, seconds)
            record[f"ways{name}"] = ways(images, size, seconds)
            print(f"measured {height} x {width}", file=sys.stderr)
            if name:
                continue
            small = imagenet.cache_images(images, own / "small", short_side=min(height, 288))
            pipelines = [(images, "", 0, 1), (small, ", cache 288", 0, 1)]
            if cores > 1:
                several = ((0, cores), (cores, 1), (1, cores))
                pipelines += [(images, "", *makers) for makers in several]
                pipelines += [(small, ", cache 288", *several[0])]
            record["pipelines"] = [
                {
                    "batches": f"{workers} workers, {threads} threads{kind}",
                    "kilobytes": float(source.sizes.mean() / 1e3),
                    "images/s": throughput(
                        source, size, batch_size, seconds, workers=workers, threads=threads
                    ),
                }
                for source, kind, workers, threads in pipelines
            ]
    setting = {
        "processor": platform.processor() or platform.machine(),
        "cores": cores,
        "opencv": cv2.__version__,
        "batch_size": batch_size,
        "image_size": size,
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    for name, rows in record.items():
        print(f"\n{name}\n\n{reports.table(rows, list(rows[0]))}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(setting | record, file)


if __name__ == "__main__":
    main()
