"""Triggers on a part of an image: a pattern with an explicit mask and an explicit range."""

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
    """A pattern and its mask.

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
    """Make a patch of one color: BadNets' white square.

    Args:
        size: side in pixels, or (height, width).
        image_shape: (C, H, W) of the images.
        place: a corner, `"center"`, or (row, column) of the patch's top left pixel.
        value: one pixel value, or one per channel, in the images' own range.
        device: the device of the patch.

    Returns:
        A patch for `stamp`.

    Raises:
        RangeError: a patch that leaves the image, a wrong number of channel values.

    Examples:
        >>> solid_patch(2, (1, 4, 4)).mask.nonzero().tolist()
        [[2, 2], [2, 3], [3, 2], [3, 3]]

    Reference:
        [Gu et al., BadNets, 2017](https://arxiv.org/abs/1708.06733)
    """
    mask = _mask(size, image_shape, place, device)
    values = [value] if isinstance(value, int | float) else list(value)
    if len(values) not in (1, image_shape[0]):
        raise RangeError(
            f"value must be one number, or one per channel; got {len(values)} values for {image_shape[0]} channels"
        )
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
    """Make a patch whose pixels are one of two values at random, the same for a seed on every device.

    Args:
        size: side in pixels, or (height, width).
        image_shape: (C, H, W) of the images.
        seed: any integer.
        place: a corner, `"center"`, or (row, column) of the patch's top left pixel.
        values: the two pixel values.
        device: the device of the patch.

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
        opacity: 1 replaces pixels, less mixes them, in [0, 1].
        pixel_range: the smallest and the largest pixel value; the result is clamped to it.

    Returns:
        New images with the shape, dtype and device of the old ones.

    Raises:
        MismatchError: a patch made for other images.
        RangeError: images outside the range (normalized ones?), opacity outside [0, 1].

    Examples:
        >>> stamp(torch.zeros(1, 1, 2, 2), solid_patch(1, (1, 2, 2)))[0, 0]
        tensor([[0., 0.],
                [0., 1.]])
    """
    if images.shape[-3:] != patch.pattern.shape or patch.mask.shape != patch.pattern.shape[-2:]:
        raise MismatchError(
            f"images must be {tuple(patch.pattern.shape)} with a mask of its size, as the patch is for; got images of "
            f"{tuple(images.shape[-3:])} and a mask of {tuple(patch.mask.shape)}"
        )
    if not 0 <= opacity <= 1:
        raise RangeError(f"opacity must be in [0, 1]; got {opacity!r}")
    check_pixels(images, pixel_range)
    pattern, mask = patch.pattern.to(images), patch.mask.to(images.device)
    mixed = pattern if opacity == 1 else images + opacity * (pattern - images)
    return torch.where(mask, mixed, images).clamp(*pixel_range)


def dynamic(
    images: Tensor, patches: Sequence[Patch], *, seed: int, pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Stamp each image with one of several patches, drawn at random: the random variant of Dynamic Backdoor.

    The patches determine patterns and places, for example `[random_patch(5, shape, seed=i, place=p) ...]`.

    Args:
        images: `(n, C, H, W)` in pixel space.
        patches: the patches; each image gets one of them.
        seed: seed of the draws, which depend on the image's position in the batch.
        pixel_range: the smallest and the largest pixel value.

    Returns:
        New images.

    Raises:
        DegenerateError: no patches.
        MismatchError: a patch made for other images.
        RangeError: images outside the range.

    Examples:
        >>> corners = "top-left", "bottom-right"
        >>> patches = [solid_patch(1, (1, 2, 2), place=p) for p in corners]
        >>> dynamic(torch.zeros(3, 1, 2, 2), patches, seed=0).sum((1, 2, 3))
        tensor([1., 1., 1.])

    Reference:
        [Salem et al., Dynamic Backdoor Attacks Against Machine Learning Models, 2020](https://arxiv.org/abs/2003.03675)
    """
    if not patches:
        raise DegenerateError("patches must not be empty; got no patches to draw from")
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
    """Stamp a patch as a camera would see it: stamped, then rotated, shifted, scaled and lit at random (PhysicalBA).

    Args:
        images: `(n, C, H, W)` in pixel space.
        patch: pattern and mask.
        seed: any integer; each image of the batch is transformed differently.
        degrees: largest rotation in either direction.
        shift: largest shift in either direction, as a fraction of the image.
        scale: smallest and largest scale.
        brightness: largest relative change of brightness in either direction.
        pixel_range: the smallest and the largest pixel value; pixels from outside the image are the smallest.

    Returns:
        New images.

    Raises:
        MismatchError: a patch made for other images.
        RangeError: images outside the range.

    Examples:
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> physical(images, solid_patch(3, (1, 8, 8)), seed=0).shape
        torch.Size([2, 1, 8, 8])

    Reference:
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
    """Refuse pixels outside the range."""
    low, high = pixel_range
    if images.numel() and (float(images.min()) < low - TOLERANCE or float(images.max()) > high + TOLERANCE):
        raise RangeError(
            f"images must be within {pixel_range}; got pixels from {float(images.min()):.3g} to "
            f"{float(images.max()):.3g}; stamp before normalizing, or use pixel_range="
        )


def _mask(size: int | tuple[int, int], image_shape: Shape, place: Place, device: torch.device | str) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    _, rows, columns = image_shape
    if not (0 < height <= rows and 0 < width <= columns):
        raise RangeError(f"size must fit on images of {rows}x{columns}; got {height}x{width}")
    top, left = _corner(place, rows - height, columns - width)
    if not (0 <= top <= rows - height and 0 <= left <= columns - width):
        raise RangeError(f"place must keep the patch on images of {rows}x{columns}; got {height}x{width} at {place}")
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
        raise RangeError(f"place must be (row, column) or one of {', '.join(corners)}; got {place!r}")
    return corners[place]
