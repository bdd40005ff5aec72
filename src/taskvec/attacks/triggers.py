"""Triggers: what is stamped on an image. Pixel space, an explicit mask, an explicit range.

A trigger is any function of images, `(n, C, H, W) -> (n, C, H, W)`. The ones here are `partial`s of `stamp`, so they
compose with your own preprocessing: stamp first, normalise afterwards.

    trigger = partial(stamp, patch=random_patch(5, (1, 28, 28), seed=0))
    logits = model(normalise(trigger(images)))
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._errors import MismatchError, RangeError
from .._random import bernoulli, random_bits

__all__ = ["Patch", "blend", "random_patch", "solid_patch", "stamp"]

Corner: TypeAlias = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]
Place: TypeAlias = Corner | tuple[int, int]
Shape: TypeAlias = tuple[int, int, int]

TOLERANCE = 1e-4  # how far pixels may leave the range, for rounding by a resize


class Patch(NamedTuple):
    """A pattern and where it is opaque.

    Attributes:
        pattern: `(C, H, W)` pixel values, float.
        mask: `(H, W)` bool, true where the pattern replaces the image.
    """

    pattern: Tensor
    mask: Tensor


def solid_patch(
    size: int | tuple[int, int],
    image_shape: Shape,
    *,
    place: Place = "bottom-right",
    value: float | tuple[float, ...] = 1.0,
    device: torch.device | str = "cpu",
) -> Patch:
    """A patch of one colour: BadNets' white square.

    Args:
        size: side in pixels, or (height, width).
        image_shape: (C, H, W) of the images.
        place: a corner, `"center"`, or (row, column) of the patch's top left pixel.
        value: one pixel value, or one a channel, in the images' own range.
        device: where the patch is to be.

    Returns:
        A patch for `stamp`.

    Raises:
        RangeError: a patch that leaves the image, a wrong number of channel values.

    Example:
        >>> solid_patch(2, (1, 4, 4)).mask.nonzero().tolist()
        [[2, 2], [2, 3], [3, 2], [3, 3]]

    Reference:
        Gu et al., BadNets, 2017, https://arxiv.org/abs/1708.06733
    """
    mask = _mask(size, image_shape, place, device)
    values = [value] if isinstance(value, int | float) else list(value)
    if len(values) not in (1, image_shape[0]):
        raise RangeError(f"{len(values)} values for {image_shape[0]} channels; give one, or one a channel")
    colour = torch.tensor([float(v) for v in values], device=device).reshape(-1, 1, 1)
    return Patch(colour.expand(image_shape) * mask, mask)


def random_patch(
    size: int | tuple[int, int],
    image_shape: Shape,
    *,
    seed: int,
    place: Place = "bottom-right",
    values: tuple[float, float] = (0.0, 1.0),
    device: torch.device | str = "cpu",
) -> Patch:
    """A patch whose pixels are one of two values at random, the same for a seed on every device.

    Args:
        size: side in pixels, or (height, width).
        image_shape: (C, H, W) of the images.
        seed: any integer.
        place: a corner, `"center"`, or (row, column) of the patch's top left pixel.
        values: the two pixel values.
        device: where the patch is to be.

    Returns:
        A patch for `stamp`.

    Raises:
        RangeError: a patch that leaves the image.

    Example:
        >>> random_patch(2, (1, 3, 3), seed=3).pattern[0]
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 0., 1.]])
    """
    mask = _mask(size, image_shape, place, device)
    bits = random_bits(seed, 0, 0, mask.numel() * image_shape[0], mask.device).reshape(image_shape)
    low, high = values
    pattern = torch.where(bernoulli(bits, 0.5), float(high), float(low))
    return Patch(pattern * mask, mask)


def stamp(
    images: Tensor, patch: Patch, *, opacity: float = 1.0, pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Put a patch on images: `x + opacity * mask * (pattern - x)`.

    Args:
        images: `(n, C, H, W)` or `(C, H, W)` in pixel space.
        patch: pattern and mask.
        opacity: 1 replaces, less mixes, in [0, 1].
        pixel_range: the smallest and the largest pixel value; the result is clamped to it.

    Returns:
        New images, shape, dtype and device of the old.

    Raises:
        MismatchError: the patch was made for other images.
        RangeError: images outside the range (normalised ones?), opacity outside [0, 1].

    Example:
        >>> stamp(torch.zeros(1, 1, 2, 2), solid_patch(1, (1, 2, 2)))[0, 0]
        tensor([[0., 0.],
                [0., 1.]])
    """
    if images.shape[-3:] != patch.pattern.shape or patch.mask.shape != patch.pattern.shape[-2:]:
        raise MismatchError(
            f"the patch is for images of {tuple(patch.pattern.shape)} with a mask of {tuple(patch.mask.shape)}, "
            f"these are {tuple(images.shape[-3:])}"
        )
    if not 0 <= opacity <= 1:
        raise RangeError(f"opacity is in [0, 1], not {opacity!r}")
    low, high = pixel_range
    if images.numel() and (float(images.min()) < low - TOLERANCE or float(images.max()) > high + TOLERANCE):
        raise RangeError(
            f"pixels from {float(images.min()):.3g} to {float(images.max()):.3g} are outside {pixel_range}; stamp "
            "before normalising, or give pixel_range="
        )
    pattern, mask = patch.pattern.to(images), patch.mask.to(images.device)
    mixed = pattern if opacity == 1 else images + opacity * (pattern - images)
    return torch.where(mask, mixed, images).clamp(low, high)


def blend(
    images: Tensor, pattern: Tensor, *, opacity: float = 0.2, pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Mix a pattern into whole images: `(1 - opacity) * x + opacity * pattern`.

    Args:
        images: `(n, C, H, W)` or `(C, H, W)` in pixel space.
        pattern: `(C, H, W)` in the same range.
        opacity: in [0, 1]; BackdoorBench takes 0.2.
        pixel_range: the smallest and the largest pixel value.

    Returns:
        New images.

    Raises:
        MismatchError: the pattern was made for other images.
        RangeError: images outside the range, opacity outside [0, 1].

    Example:
        >>> blend(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2), opacity=0.25)
        tensor([[[[0.2500, 0.2500]]]])

    Reference:
        Chen et al., Targeted Backdoor Attacks, 2017, https://arxiv.org/abs/1712.05526
    """
    everywhere = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device)
    return stamp(images, Patch(pattern, everywhere), opacity=opacity, pixel_range=pixel_range)


def _mask(size: int | tuple[int, int], image_shape: Shape, place: Place, device: torch.device | str) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    _, rows, columns = image_shape
    if not (0 < height <= rows and 0 < width <= columns):
        raise RangeError(f"a patch of {height}x{width} does not fit on images of {rows}x{columns}")
    top, left = _corner(place, rows - height, columns - width)
    if not (0 <= top <= rows - height and 0 <= left <= columns - width):
        raise RangeError(f"a patch of {height}x{width} at {place} leaves images of {rows}x{columns}")
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    mask[top : top + height, left : left + width] = True
    return mask


def _corner(place: Place, last_row: int, last_column: int) -> tuple[int, int]:
    if not isinstance(place, str):
        return place
    corners = {
        "top-left": (0, 0),
        "top-right": (0, last_column),
        "bottom-left": (last_row, 0),
        "bottom-right": (last_row, last_column),
        "center": (last_row // 2, last_column // 2),
    }
    if place not in corners:
        raise RangeError(f"place is (row, column) or one of {', '.join(corners)}, not {place!r}")
    return corners[place]
