"""Patches: a pattern that replaces a part of an image."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._engine.random import bernoulli, random_bits
from ...errors import DegenerateError, MismatchError, RangeError

__all__ = ["Patch", "dynamic", "physical", "random_patch", "solid_patch", "stamp"]

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

    Examples:
        >>> solid_patch(2, (1, 4, 4)).mask.nonzero().tolist()
        [[2, 2], [2, 3], [3, 2], [3, 3]]

    References:
        [Gu et al., BadNets, 2017](https://arxiv.org/abs/1708.06733)
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

    Examples:
        >>> random_patch(2, (1, 3, 3), seed=3).pattern[0]
        tensor([[0., 0., 0.],
                [0., 0., 1.],
                [0., 0., 0.]])
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

    Examples:
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
    check_pixels(images, pixel_range)
    pattern, mask = patch.pattern.to(images), patch.mask.to(images.device)
    mixed = pattern if opacity == 1 else images + opacity * (pattern - images)
    return torch.where(mask, mixed, images).clamp(*pixel_range)


def dynamic(
    images: Tensor, patches: Sequence[Patch], *, seed: int, pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Stamp each image with one of several patches, drawn at random: the random variant of Dynamic Backdoor.

    Patterns and places are what the patches are made with, such as `[random_patch(5, shape, seed=i, place=p) ...]`.

    Args:
        images: `(n, C, H, W)` in pixel space.
        patches: of which each image gets one.
        seed: of the draws; the image's place in the batch decides.
        pixel_range: the smallest and the largest pixel value.

    Returns:
        New images.

    Raises:
        DegenerateError: no patches.
        MismatchError: a patch that was made for other images.
        RangeError: images outside the range.

    Examples:
        >>> corners = [solid_patch(1, (1, 2, 2), place=p) for p in ("top-left", "bottom-right")]
        >>> dynamic(torch.zeros(3, 1, 2, 2), corners, seed=0).sum((1, 2, 3))
        tensor([1., 1., 1.])

    References:
        [Salem et al., Dynamic Backdoor Attacks Against Machine Learning Models, 2020](https://arxiv.org/abs/2003.03675)
    """
    if not patches:
        raise DegenerateError("no patches to draw from")
    drawn = random_bits(seed, 0, 0, len(images), images.device).remainder(len(patches))
    stamped = images
    for i, patch in enumerate(patches):
        chosen = (drawn == i).reshape(-1, 1, 1, 1)
        stamped = torch.where(chosen, stamp(images, patch, pixel_range=pixel_range), stamped)
    return stamped


def physical(
    images: Tensor,
    patch: Patch,
    *,
    seed: int,
    degrees: float = 10.0,
    shift: float = 0.1,
    scale: tuple[float, float] = (0.8, 0.9),
    brightness: float = 0.2,
    pixel_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """A patch as a camera would see it: stamped, then turned, moved, scaled and lit at random (PhysicalBA).

    Args:
        images: `(n, C, H, W)` in pixel space.
        patch: pattern and mask.
        seed: any integer; each image of the batch is treated differently.
        degrees: largest rotation either way.
        shift: largest shift either way, as a fraction of the image.
        scale: smallest and largest scale.
        brightness: largest relative change of brightness either way.
        pixel_range: the smallest and the largest pixel value; what comes in from outside is the smallest.

    Returns:
        New images.

    Raises:
        MismatchError: the patch was made for other images.
        RangeError: images outside the range.

    Examples:
        >>> physical(torch.zeros(2, 1, 8, 8), solid_patch(3, (1, 8, 8)), seed=0).shape
        torch.Size([2, 1, 8, 8])

    References:
        [Li et al., Backdoor Attack in the Physical World, 2021](https://arxiv.org/abs/2104.02361)
    """
    low, high = pixel_range
    stamped = stamp(images, patch, pixel_range=pixel_range)
    draws = random_bits(seed, 0, 0, 5 * len(images), images.device).to(images.dtype).reshape(5, -1) / 2.0**31
    turn, ratio = draws[0] * degrees * torch.pi / 180, scale[0] + (draws[1] + 1) / 2 * (scale[1] - scale[0])
    cos, sin = turn.cos() / ratio, turn.sin() / ratio
    rows = torch.stack([cos, -sin, draws[2] * 2 * shift, sin, cos, draws[3] * 2 * shift], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(rows, list(stamped.shape), align_corners=False)
    seen = F.grid_sample(stamped - low, grid, align_corners=False)
    return (low + seen * (1 + brightness * draws[4]).reshape(-1, 1, 1, 1)).clamp(low, high)


def check_pixels(images: Tensor, pixel_range: tuple[float, float]) -> None:
    low, high = pixel_range
    if images.numel() and (float(images.min()) < low - TOLERANCE or float(images.max()) > high + TOLERANCE):
        raise RangeError(
            f"pixels from {float(images.min()):.3g} to {float(images.max()):.3g} are outside {pixel_range}; stamp "
            "before normalising, or give pixel_range="
        )


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
