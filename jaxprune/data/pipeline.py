"""Turns a data set in memory into batches: chooses examples, augments and normalises them.

data = load("fashion_mnist")
images = jax.device_put(data.train.images)             # once: the whole set lives on the device
batches = index_batches(len(images), 128, seed=0)      # Grain; its position is checkpointed
batch = normalize(augment(key, images[next(batches)], pad=4, flip=True), data.mean, data.std)
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import grain


def index_batches(size: int, batch_size: int, *, seed: int) -> "grain.DatasetIterator[Any]":
    """Iterates forever over shuffled batches of example indices.

    Each epoch is a fresh permutation of 0 .. size - 1 that depends only on `seed` and the epoch,
    cut into size // batch_size batches. Batches are always full and never span two epochs: the
    size % batch_size examples at the end of the permutation are skipped in that epoch, different
    ones in each.

    The iterator's `get_state()` is a dict of ints (`{"next_index": number of batches so far}`),
    ready for JSON. `set_state()` of a new iterator with the same arguments continues exactly there,
    for the price of one permutation. Size, batch size and seed are not part of the state: store
    them with the configuration.

    Args:
        size: number of examples.
        batch_size: indices per batch.
        seed: 0 .. 2**64 - 1.

    Returns:
        A Grain iterator over int32 [batch_size] NumPy arrays.

    Raises:
        ValueError: if an argument is out of range; it lists all of them.

    Example:
        >>> batches = index_batches(10, 5, seed=0)
        >>> sorted(int(i) for batch in (next(batches), next(batches)) for i in batch)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> batches.get_state()
        {'next_index': 2}
    """
    import grain

    # Threads would not help, as nothing here waits.
    dataset = batches_of_indices(size, batch_size, seed=seed)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def batches_of_indices(size: int, batch_size: int, *, seed: int) -> "grain.MapDataset[Any]":
    """Returns the batches of `index_batches` as a data set, to map them to what they stand for.

    Example:
        >>> dataset = batches_of_indices(10, 5, seed=0)
        >>> sorted(int(i) for batch in (dataset[6], dataset[7]) for i in batch)  # epoch 3
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    bad = []
    if not 1 <= size < 2**31:
        bad.append(f"`size` must be in 1 .. 2**31 - 1; got {size}: load a data set with examples")
    if not 1 <= batch_size <= size:
        bad.append(
            f"`batch_size` must be in 1 .. size ({size}); got {batch_size}: "
            "every batch is full, so choose one that the data set can fill"
        )
    if not 0 <= seed < 2**64:
        bad.append(f"`seed` must be in 0 .. 2**64 - 1; got {seed}: choose a different one")
    if bad:
        raise ValueError("; ".join(bad))
    import grain

    per_epoch = size // batch_size

    @functools.lru_cache(maxsize=1)
    def permutation(epoch: int) -> np.ndarray:
        # Philox's raw output is the same in every version of NumPy; `permutation` promises nothing.
        draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
        return np.argsort(draws, kind="stable").astype(np.int32)

    def batch(index: int, within: int) -> np.ndarray:
        start = within * batch_size
        return permutation(index // per_epoch)[start : start + batch_size].copy()

    # Grain's own shuffle and batch take 9 us per example (1.2 ms for a batch of 128, 4.8 ms for
    # 512); with whole batches as elements it is 0.04 and 0.12 ms.
    return grain.MapDataset.range(per_epoch).repeat().map_with_index(batch)


def augment(key: jax.Array, images: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Shifts each image by up to `pad` pixels in each direction, and mirrors about half of them.

    Each image is padded with `pad` zeros on all sides, and a window of the old size is cut out at
    an offset drawn from 0 .. 2 * pad for each axis. Then, if `flip`, it is mirrored left to right
    with probability 1/2. With pad 0 and no flip the images are returned unchanged.

    Args:
        key: one key per batch; every image gets separate draws.
        images: [B, H, W, C], any dtype. The padding is 0, so augment before normalizing.
        pad: number of pixels on each side; static.
        flip: whether to mirror; static. Use False where left and right have a meaning (digits).

    Returns:
        [B, H, W, C] of the same dtype.

    Raises:
        ValueError: if `pad` is negative or `images` does not have four dimensions.

    Example:
        >>> images = jnp.ones((2, 8, 8, 1), jnp.uint8)
        >>> jax.jit(functools.partial(augment, pad=2, flip=True))(jax.random.key(0), images).shape
        (2, 8, 8, 1)
    """
    if pad < 0:
        raise ValueError(f"`pad` must be at least 0; got {pad}: use 0 for no shift")
    if images.ndim != 4:
        raise ValueError(f"`images` must be [B, H, W, C]; got shape {images.shape}")
    key_crop, key_flip = jax.random.split(key)
    size = images.shape[0]
    if pad:
        offsets = jax.random.randint(key_crop, (size, 2), 0, 2 * pad + 1)
        images = _crop(images, offsets, pad)
    if flip:
        mirrored = jax.random.bernoulli(key_flip, 0.5, (size, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def _crop(images: jax.Array, offsets: jax.Array, pad: int) -> jax.Array:
    """Pads with zeros and cuts out windows of the old size at offsets [B, 2]."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def window(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(window)(padded, offsets)


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Scales pixels to zero mean and unit variance: (images / 255 - mean) / std.

    Args:
        images: [..., C], uint8 or float, in 0 .. 255.
        mean: mean of images / 255 per channel; Python floats.
        std: standard deviation of images / 255 per channel; Python floats.
        dtype: dtype of the result. The arithmetic is float32.

    Returns:
        [..., C] of dtype `dtype`.

    Raises:
        ValueError: if `mean` or `std` does not have one entry per channel, or a deviation is not
            positive.

    Example:
        >>> normalize(jnp.array([[0, 255]], jnp.uint8), (0.5, 0.5), (0.5, 0.25))
        Array([[-1.,  2.]], dtype=float32)
    """
    channels = images.shape[-1]
    bad = [
        f"`{name}` must have one entry per channel ({channels}); got {len(values)}"
        for name, values in (("mean", mean), ("std", std))
        if len(values) != channels
    ]
    if not all(value > 0 for value in std):
        bad.append(f"`std` must be positive; got {tuple(std)}: use 1 for a constant channel")
    if bad:
        raise ValueError("; ".join(bad))
    # Fold the constants in float64; one multiplication and one addition per pixel remain.
    divisor = np.asarray(std, np.float64)
    scale = (1 / (255 * divisor)).astype(np.float32)
    shift = (-np.asarray(mean, np.float64) / divisor).astype(np.float32)
    shape = (1,) * (images.ndim - 1) + (channels,)
    return (images.astype(jnp.float32) * scale.reshape(shape) + shift.reshape(shape)).astype(dtype)
