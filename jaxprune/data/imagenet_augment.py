"""Decodes images to uint8 pixels of a fixed size: random crops for training, fixed for testing.

    JPEG --size from its header--> box --decoded at 1, 1/2, 1/4 or 1/8--> cropped, resized, mirrored

OpenCV does all of it and releases the interpreter lock, so threads decode in parallel.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TRIES = 10  # number of boxes drawn for an image before a central one is taken
DRAWS = 2 * TRIES + 3  # number of random numbers for an image
_JPEG = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that state a size
_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # JPEG markers without content


class Box(NamedTuple):
    """A part of an image, in pixels.

    Example:
        >>> Box(0, 10, 100, 50).width
        50
    """

    top: int
    left: int
    height: int
    width: int


@functools.cache
def one_thread() -> None:
    """Turns OpenCV's threads off in this process, as many images are processed in parallel.

    Example:
        >>> one_thread()
    """
    import cv2

    cv2.setNumThreads(0)


def random_draws(seed: int, step: int, count: int) -> np.ndarray:
    """Draws the random numbers for the images of a step.

    Args:
        seed: 0 .. 2**64 - 1.
        step: 0 .. 2**64 - 1.
        count: number of images.

    Returns:
        float64 [count, DRAWS], uniform in [0, 1); the same on every machine and in every version
        of NumPy.

    Example:
        >>> random_draws(0, 7, 4).shape
        (4, 23)
    """
    # The counter avoids the streams of `index_batches`, which have keys of the same form.
    key, counter = np.array([seed, step], np.uint64), np.array([0, 0, 0, 1], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count * DRAWS)
    return (raw >> np.uint64(11)).reshape(count, DRAWS) * 2.0**-53


def random_box(
    height: int,
    width: int,
    draws: Sequence[float],
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draws the part of an image that becomes a training image.

    The area (as a fraction of the image), the logarithm of width / height and the position are
    uniform. A box that does not fit into the image is drawn again; after `TRIES` boxes the largest
    central box with an allowed ratio is taken.

    Args:
        height: height of the image.
        width: width of the image.
        draws: `DRAWS` numbers in [0, 1).
        area: smallest and largest area.
        ratio: smallest and largest width over height.

    Returns:
        The `Box`.

    Example:
        >>> random_box(375, 500, [0.5] * DRAWS)
        Box(top=29, left=91, height=318, width=318)

    References:
        C. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 2 * TRIES, 2):
        target = height * width * (area[0] + draws[i] * (area[1] - area[0]))
        shape = math.exp(low + draws[i + 1] * (high - low))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = draws[-3] * (height - h + 1), draws[-2] * (width - w + 1)
            return Box(int(top), int(left), h, w)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def image_size(data: bytes) -> tuple[int, int] | None:
    """Reads height and width of a JPEG from its header.

    Args:
        data: the file.

    Returns:
        Height and width, before any rotation given in the file; None if this is no JPEG or a
        damaged one.

    Example:
        >>> image_size(b"no image") is None
        True
    """
    if data[:2] != _JPEG:
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return (height, width) if height and width else None
        if marker == 0xFF:  # filler
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def decode(data: bytes, reduction: int = 1) -> np.ndarray | None:
    """Decodes an image to RGB.

    Grey images get three equal channels, CMYK is converted, and PNG is accepted too. A rotation
    given in the file is ignored, as in TensorFlow and torchvision.

    Args:
        data: the file.
        reduction: 1, 2, 4 or 8: a JPEG is decoded at 1 / reduction of its size, averaged, which
            skips most of the inverse transform.

    Returns:
        uint8 [ceil(height / reduction), ceil(width / reduction), 3]; None if the image is damaged.

    Example:
        >>> decode(b"no image") is None
        True
    """
    import cv2

    scales = {
        1: 0,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    }
    flags = scales[reduction] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # no bytes, or an absurd size
        return None


def reduction_for(side: int, size: int) -> int:
    """Chooses the strongest reduction that leaves a side long enough.

    Args:
        side: length of the side, in pixels.
        size: length needed, in pixels.

    Returns:
        8, 4, 2 or 1.

    Example:
        >>> reduction_for(1000, 224), reduction_for(447, 224)
        (4, 1)
    """
    return next((factor for factor in (8, 4, 2) if side >= factor * size), 1)


def full_size(data: bytes) -> tuple[int, int] | None:
    """Finds height and width of an image of any format; a JPEG is not decoded for it.

    Args:
        data: the file.

    Returns:
        Height and width; None if the image is damaged.

    Example:
        >>> full_size(b"no image") is None
        True
    """
    if data[:2] == _JPEG:
        return image_size(data)
    pixels = decode(data)  # decoding twice is fine, as ImageNet has only one PNG
    return None if pixels is None else (pixels.shape[0], pixels.shape[1])


def decode_for(
    data: bytes, full: tuple[int, int], side: int, size: int
) -> tuple[np.ndarray | None, int]:
    """Decodes an image at the strongest reduction that leaves a side long enough.

    Args:
        data: the file.
        full: height and width of the image.
        side: length of the side in the full image, in pixels.
        size: length needed, in pixels.

    Returns:
        The pixels as from `decode`, and the reduction.

    Example:
        >>> decode_for(b"no image", (600, 500), 500, 224)
        (None, 1)
    """
    reduction = reduction_for(side, size) if data[:2] == _JPEG else 1
    pixels = decode(data, reduction)
    if pixels is not None and pixels.shape[:2] != tuple(-(-n // reduction) for n in full):
        return None, reduction
    return pixels, reduction


def cut_out(pixels: np.ndarray, box: Box, reduction: int, mirrored: bool, out: np.ndarray) -> None:
    """Resizes a part of an image bilinearly, and mirrors it if asked.

    Args:
        pixels: uint8 [H, W, 3], the image at 1 / `reduction` of its size.
        box: the part, in pixels of the full image; it is rounded to the pixels of `pixels`.
        reduction: 1, 2, 4 or 8.
        mirrored: whether to exchange left and right.
        out: uint8 [size, size, 3], C-contiguous; receives the result.

    Example:
        >>> out = np.zeros((1, 1, 3), np.uint8)
        >>> cut_out(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), Box(2, 0, 2, 2), 2, False, out)
        >>> out
        array([[[6, 7, 8]]], dtype=uint8)
    """
    import cv2

    top, left, height, width = (round(n / reduction) for n in box)
    top, left = min(top, len(pixels) - height), min(left, pixels.shape[1] - width)
    part = pixels[top : top + height, left : left + width]
    if mirrored:
        cv2.flip(cv2.resize(part, out.shape[:2], interpolation=cv2.INTER_LINEAR), 1, dst=out)
    else:
        cv2.resize(part, out.shape[:2], dst=out, interpolation=cv2.INTER_LINEAR)


def train_image(
    data: bytes, draws: Sequence[float], out: np.ndarray, *, min_area: float = 0.08
) -> bool:
    """Decodes an image, crops it at random, resizes it, and mirrors it with probability 1/2.

    Args:
        data: the file.
        draws: `DRAWS` numbers in [0, 1).
        out: uint8 [size, size, 3], C-contiguous; receives the result.
        min_area: smallest fraction of the image that a crop keeps.

    Returns:
        Whether the image could be decoded; if not, `out` is unchanged.

    Example:
        >>> train_image(b"no image", [0.5] * DRAWS, np.zeros((4, 4, 3), np.uint8))
        False
    """
    full = full_size(data)
    if full is None:
        return False
    box = random_box(*full, draws, (min_area, 1.0))
    pixels, reduction = decode_for(data, full, min(box.height, box.width), len(out))
    if pixels is None:
        return False
    cut_out(pixels, box, reduction, draws[-1] >= 0.5, out)
    return True


def eval_image(data: bytes, out: np.ndarray, *, resize: int = 256) -> bool:
    """Decodes an image, resizes its short side, and cuts out the centre.

    Args:
        data: the file.
        out: uint8 [size, size, 3], C-contiguous; receives the result.
        resize: length of the short side, at least `size`; the long side is rounded down.

    Returns:
        Whether the image could be decoded; if not, `out` is unchanged.

    Example:
        >>> eval_image(b"no image", np.zeros((4, 4, 3), np.uint8), resize=5)
        False
    """
    import cv2

    full = full_size(data)
    if full is None:
        return False
    short, size = min(full), len(out)
    pixels, _ = decode_for(data, full, short, resize)
    if pixels is None:
        return False
    height, width = (resize * side // short for side in full)
    whole = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = round((height - size) / 2), round((width - size) / 2)
    out[:] = whole[top : top + size, left : left + size]
    return True
