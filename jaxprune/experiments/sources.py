"""The data of a run: a small data set that lives on the devices, images in files, or text.

A small data set is decoded once, and a batch is a row of indices. For ImageNet, workers beside the
training read, decode and crop this process's part of every batch; for text, threads read it.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprune import data, sharding
from jaxprune.experiments.config import Config

Size = tuple[int, ...]  # height and width of images; length of text
HELD_OUT = 2048  # most windows of text to evaluate on


class Source(NamedTuple):
    """A data set, and how a network gets its images."""

    size: int  # training examples: images, or windows of text
    shape: tuple[int, ...]  # of an example: height, width, channels; of text its bytes
    num_classes: int
    train: Any  # data.Split on the devices; None where batches are read
    test: Any  # the same, or a function that yields batches, see training.make_evaluate
    batches: Callable[[int, int], Iterator[Any]]  # (seed, first batch), see training.fit
    first: Callable[[int], data.Split]  # the first training examples, in memory
    augment: Callable[[jax.Array, jax.Array], jax.Array]  # (key, uint8 images) -> uint8 images
    prepare: Callable[[jax.Array], jax.Array]  # uint8 examples -> what the model takes
    fingerprint: Callable[[], int]  # of the data; the same on all processes
    example: Any  # a few prepared examples on all devices, or their shapes
    label: tuple[int, ...] = ()  # shape of the labels of an example: one, or one for each byte
    unseen: Any = None  # test images on the devices, where `test` holds training images

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """Those of examples and labels, before they are prepared."""
        return jnp.uint8, jnp.uint8 if self.label else jnp.int32


def open_source(config: Config, mesh: Mesh) -> Source:
    """Opens the data set of a configuration."""
    kinds = {"imagenet2012": files, "text": of_text}
    return kinds.get(config.dataset, resident)(config, mesh)


def image_sizes(config: Config, full: Size, steps: int) -> Mapping[int, Size]:
    """Returns step -> size of the training images from then on; text has one size."""
    if config.small_images == 1 or config.small_until == 0:
        return {0: full}
    height, width = (round(side * config.small_images) for side in full)
    if min(height, width) < 4:
        raise ValueError(
            f"`small_images` {config.small_images} makes images of {height} x {width} pixels of "
            f"{full[0]} x {full[1]}; at least 4 x 4 must be left"
        )
    return {0: (height, width), step_after(steps, config.small_until): full}


def step_after(steps: int, fraction: float) -> int:
    """Returns the step after a fraction of all: with a mask update at the same fraction.

    Example:
        >>> step_after(100, 0.3), step_after(100, 1.0)
        (31, 100)
    """
    return min(round(steps * fraction), steps - 1) + 1


def resident(config: Config, mesh: Mesh) -> Source:
    """Puts a small data set on every device."""
    whole = load_data(config)
    dataset = held_out(whole, config.validation, config.train_images)
    few = dataset.train.images[:8]
    unseen = whole.test if config.validation else None
    parts = dataset.train, dataset.test, few, unseen
    train, test, few, unseen = sharding.replicate(parts, mesh)
    side = config.enlarge

    def prepare(images: jax.Array) -> jax.Array:
        images = data.normalize(images, dataset.mean, dataset.std, config.dtype)
        return enlarged(images, side) if side else images

    size = len(dataset.train.labels)

    def batches(seed: int, start: int) -> Iterator[Any]:
        found = data.index_batches(size, config.batch_size, seed=seed)
        found.set_state({"next_index": start})
        return found

    next(batches(config.seed, 0))  # batch size and seed are checked before anything is compiled

    def fingerprint() -> int:
        parts = [*dataset.train, *dataset.test]
        return functools.reduce(
            lambda crc, part: zlib.crc32(np.asarray(part).tobytes(), crc), parts, 0
        )

    return Source(
        size=size,
        shape=(side, side, 3) if side else dataset.train.images.shape[1:],
        num_classes=dataset.num_classes,
        train=train,
        test=test,
        batches=batches,
        first=lambda count: data.Split(*(part[:count] for part in dataset.train)),
        augment=lambda key, images: data.augment(key, images, pad=config.pad, flip=config.flip),
        prepare=prepare,
        fingerprint=fingerprint,
        example=prepare(few),
        unseen=unseen,
    )


def enlarged(images: jax.Array, side: int) -> jax.Array:
    """Resizes images [B, H, W, 1 or 3] to [B, side, side, 3]; grey is copied to all channels."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"`enlarge` needs images of 1 or 3 channels; got {images.shape[-1]}")
    shape = (len(images), side, side, images.shape[-1])
    return jnp.broadcast_to(jax.image.resize(images, shape, "linear"), (*shape[:3], 3))


def files(config: Config, mesh: Mesh) -> Source:
    """Opens ImageNet; crops and mirroring happen where images are decoded."""
    from jaxprune.data import imagenet

    found = imagenet.load(config.source_dir or ".", data_dir=config.data_dir or None)
    train, test = found.train, found.test
    if config.validation:
        train, test = imagenet.hold_out(train, config.validation)
    mine = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    options: dict[str, Any] = {"image_size": config.image_size, "workers": config.workers}
    options |= mine | {"threads": config.threads or None}
    # Options are checked before anything is compiled.
    imagenet.train_batches(train, config.batch_size, seed=config.seed, stop=0, **options).close()

    def batches(seed: int, start: int) -> Iterator[Any]:
        with imagenet.train_batches(
            train, config.batch_size, seed=seed, start=start, **options
        ) as made:
            for batch in made:
                yield batch[:2]

    def read() -> Iterator[Any]:
        resize = round(config.image_size * 256 / 224)
        with imagenet.eval_batches(test, config.eval_batch_size, resize=resize, **options) as made:
            for images, labels, weights in made:
                yield images, labels, weights > 0

    def first(count: int) -> data.Split:
        size = config.image_size
        with imagenet.train_batches(
            train, count, seed=config.seed, stop=1, image_size=size
        ) as made:
            return data.Split(*next(made)[:2])

    def prepare(images: jax.Array) -> jax.Array:
        return data.normalize(images, found.mean, found.std, config.dtype)

    def fingerprint() -> int:
        return zlib.crc32(test.labels.tobytes(), zlib.crc32(train.labels.tobytes()))

    return Source(
        size=len(train),
        shape=(config.image_size, config.image_size, 3),
        num_classes=found.num_classes,
        train=None,
        test=read,
        batches=batches,
        first=first,
        augment=lambda key, images: images,
        prepare=prepare,
        fingerprint=fingerprint,
        example=sharding.replicate(prepare(jnp.asarray(first(8).images)), mesh),
    )


def of_text(config: Config, mesh: Mesh) -> Source:
    """Opens the text files of a folder; an example is a window of them."""
    if not config.source_dir:
        raise ValueError("`source_dir` must name the folder with text files for the data set text")
    corpus = data.text.open_folder(config.source_dir)
    train, test = data.text.split(corpus, config.length)
    shown = np.linspace(0, test.size - 1, min(HELD_OUT, test.size)).astype(int)
    if count := config.validation:
        if count >= train.size:
            raise ValueError(
                f"`validation` must be less than the {train.size} windows; got {count}"
            )
        train = train._replace(size=train.size - count)
        test, shown = train, np.arange(train.size, train.size + count)
    mine = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def batches(seed: int, start: int) -> Iterator[Any]:
        options = mine | {"seed": seed, "start": start}
        return data.text.train_batches(corpus, train, config.batch_size, **options)

    batches(config.seed, 0)  # batch size and seed are checked before anything is compiled

    def read() -> Iterator[Any]:
        whole, part = config.eval_batch_size, config.eval_batch_size // mine["process_count"]
        own = np.arange(part) + part * mine["process_index"]
        for first in range(0, len(shown), whole):
            valid = first + own < len(shown)
            rows = shown[np.where(valid, first + own, 0)]
            yield *data.text.examples(corpus, test, rows), valid

    def first(count: int) -> data.Split:
        return data.Split(*data.text.examples(corpus, train, range(count)))

    def prepare(tokens: jax.Array) -> jax.Array:
        return tokens.astype(jnp.int32)

    return Source(
        size=train.size,
        shape=(config.length,),
        num_classes=256,
        train=None,
        test=read,
        batches=batches,
        first=first,
        augment=lambda key, tokens: tokens,
        prepare=prepare,
        fingerprint=lambda: data.text.fingerprint(corpus),
        example=sharding.replicate(prepare(jnp.asarray(first(8).images)), mesh),
        label=(config.length,),
    )


def load_data(config: Config) -> data.Dataset:
    """Loads a small data set; of synthetic images just enough for four batches."""
    if config.dataset != "synthetic":
        source = config.source_dir or None
        return data.load(config.dataset, data_dir=config.data_dir or None, source_dir=source)
    shape = (config.image_size, config.image_size, 3)
    options: dict[str, Any] = {"train_size": 4 * config.batch_size, "test_size": config.batch_size}
    return data.load("synthetic", image_shape=shape, num_classes=1000, **options)


def held_out(dataset: data.Dataset, count: int, first: int = 0) -> data.Dataset:
    """Holds out the last `count` training images, and evaluates on them instead of the test images.

    Of those that are left, the `first` ones are trained on; 0 stands for all.
    """
    size = len(dataset.train.labels)
    if not count and not first:
        return dataset
    if count >= size:
        raise ValueError(f"`validation` must be less than the {size} training images; got {count}")
    if first > size - count:
        raise ValueError(
            f"`train_images` must be at most the {size - count} training images; got {first}"
        )
    train, test = (
        data.Split(dataset.train.images[part], dataset.train.labels[part])
        for part in (slice(first or size - count), slice(size - count, size))
    )
    return dataset._replace(train=train, test=test if count else dataset.test)
