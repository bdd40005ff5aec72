"""Triggers that change every pixel of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._engine.random import random_bits
from ...errors import MismatchError, RangeError
from ._patch import Patch, check_pixels, stamp

__all__ = ["blend", "sinusoid", "warp", "warp_field"]


def blend(
    images: Tensor, pattern: Tensor, *, opacity: float = 0.2, pixel_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Mix a pattern into whole images: `(1 - opacity) * x + opacity * pattern`.

    Args:
        images: `(n, C, H, W)` or `(C, H, W)` in pixel space.
        pattern: `(C, H, W)` in the same range.
        opacity: in [0, 1]; BackdoorBench uses 0.2.
        pixel_range: the smallest and the largest pixel value.

    Returns:
        New images.

    Raises:
        MismatchError: a pattern made for other images.
        RangeError: images outside the range, opacity outside [0, 1].

    Examples:
        >>> blend(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2), opacity=0.25)
        tensor([[[[0.2500, 0.2500]]]])

    Reference:
        [Chen et al., Targeted Backdoor Attacks, 2017](https://arxiv.org/abs/1712.05526)
    """
    everywhere = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device)
    return stamp(images, Patch(pattern, everywhere), opacity=opacity, pixel_range=pixel_range)


def sinusoid(
    images: Tensor,
    *,
    amplitude: float = 40 / 255,
    frequency: float = 6.0,
    pixel_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Add a horizontal sine wave to images (SIG): `x + amplitude * sin(2 pi j frequency / W)` in column j, clamped.

    Args:
        images: `(n, C, H, W)` or `(C, H, W)` in pixel space.
        amplitude: in units of the range; BackdoorBench uses 40/255.
        frequency: periods over the width.
        pixel_range: the smallest and the largest pixel value; the amplitude is a fraction of their difference.

    Returns:
        New images.

    Raises:
        RangeError: images outside the range.

    Examples:
        >>> gray = torch.full((1, 1, 1, 4), 0.5)
        >>> sinusoid(gray, amplitude=0.5, frequency=1)[0, 0, 0].abs()
        tensor([0.5000, 1.0000, 0.5000, 0.0000])

    Reference:
        [Barni et al., A new backdoor attack in CNNs, 2019](https://arxiv.org/abs/1902.11237)
    """
    check_pixels(images, pixel_range)
    low, high = pixel_range
    column = torch.arange(images.shape[-1], device=images.device, dtype=torch.float64)
    wave = (2 * torch.pi * column * frequency / images.shape[-1]).sin() * amplitude * (high - low)
    return (images + wave.to(images.dtype)).clamp(low, high)


def warp_field(
    side: int, *, seed: int, control: int = 4, strength: float = 0.5, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw WaNet's smooth displacement of pixels, for `warp`.

    Noise `u ~ U(-1, 1)` of `(2, control, control)`, divided by its mean magnitude, is enlarged to the image by bicubic
    interpolation; the field is `clamp(identity + strength * u / side, -1, 1)`.

    Args:
        side: height and width of the images.
        seed: any integer.
        control: points per side at which the noise is drawn.
        strength: strength of the displacement.
        device: the device of the field.

    Returns:
        `(side, side, 2)` sampling positions in [-1, 1], x before y.

    Raises:
        RangeError: sizes that are not positive.

    Examples:
        >>> warp_field(28, seed=0).shape
        torch.Size([28, 28, 2])

    Reference:
        [Nguyen and Tran, WaNet, 2021](https://arxiv.org/abs/2102.10369)
    """
    if side < 1 or control < 1:
        raise RangeError(f"side and control must be positive; got {side} and {control}")
    bits = random_bits(seed, 0, 0, 2 * control * control, torch.device(device))
    noise = (bits.to(torch.float32) / 2.0**31).reshape(1, 2, control, control)
    noise = noise / noise.abs().mean()
    smooth = F.interpolate(noise, size=side, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    line = torch.linspace(-1, 1, side, device=device)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return (torch.stack([columns, rows], dim=-1) + strength * smooth / side).clamp(-1, 1)


def warp(images: Tensor, field: Tensor) -> Tensor:
    """Move pixels along a smooth field (WaNet).

    Args:
        images: `(n, C, H, W)` or `(C, H, W)`.
        field: `(H, W, 2)`, the result of `warp_field`, or `(n, H, W, 2)`, one per image.

    Returns:
        New images, sampled bilinearly.

    Raises:
        MismatchError: a field for images of another size.

    Examples:
        >>> x = torch.rand(2, 1, 8, 8)
        >>> (warp(x, warp_field(8, seed=0)) - x).abs().mean() > 0
        tensor(True)

    Reference:
        [Nguyen and Tran, WaNet, 2021](https://arxiv.org/abs/2102.10369)
    """
    if field.shape[-3:-1] != images.shape[-2:]:
        raise MismatchError(
            f"images must be {tuple(field.shape[-3:-1])}, as the field is for; got {tuple(images.shape[-2:])}"
        )
    batch = images if images.ndim == 4 else images[None]
    places = field.to(batch).expand(len(batch), *field.shape[-3:])
    moved = F.grid_sample(batch, places, align_corners=True)
    return moved if images.ndim == 4 else moved[0]
