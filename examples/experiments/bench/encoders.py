"""Two kinds of small encoder, as functions of a plain mapping of parameters.

An encoder turns images (n, 1, 28, 28) in [0, 1] into features (n, 128). The module holds the architecture only: every
call says which parameters to use, so a merged state dict is a model as it is, and nothing is ever loaded or copied.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128  # of the features
PATCH = 7  # side of a ViT's patches: 28 x 28 pixels are 16 tokens
HEAD = 32  # channels of an attention head


class Encoder(NamedTuple):
    """An architecture and how long and how fast it is trained.

    `centred` is for its heads, which then measure features from the classes' mean: where that makes the clean merge of
    five tasks more accurate on validation images. vits gains two to three points by it, vit7 and the CNN lose as much.
    """

    name: str
    module: nn.Module
    lr: float  # of fine-tuning
    pretrain_lr: float
    pretrain_steps: int
    centred: bool = False


class Block(nn.Module):
    """Pre-norm attention and MLP on tokens (n, tokens, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD)).unbind(2)  # each (n, tokens, heads, 32)
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PatchTransformer(nn.Module):
    """A ViT without class token: patches, blocks, mean over the tokens, a linear map."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.place = nn.Parameter(0.02 * torch.randn((28 // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        patches = _normalised(images).unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))  # (n, 1, 4, 7, 4, 7)
        tokens = self.embed(patches.transpose(3, 4).flatten(4).flatten(1, 3)) + self.place
        return self.out(self.norm(self.blocks(tokens)).mean(1))


class Residual(nn.Module):
    """Two convolutions with GroupNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """Three residual stages of 32, 64 and 128 channels on 14, 7 and 4 pixels a side, mean over them, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, 32)
        self.stages = nn.Sequential(Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2))
        self.out = nn.Linear(128, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(_normalised(images))))
        return self.out(self.stages(x).mean((2, 3)))


def _normalised(images: Tensor) -> Tensor:
    return (images - 0.2) / 0.35  # about the mean and deviation of the pixels of all tasks


def vit(width: int, layers: int) -> nn.Module:
    """A ViT with 7 x 7 patches, MLP ratio 2 and heads of 32 channels."""
    return PatchTransformer(width, layers)


def cnn() -> nn.Module:
    """A residual network with GroupNorm (it keeps no statistics, which merging would spoil)."""
    return ResidualNetwork()


def encoder(name: str, seed: int = 0) -> Encoder:
    """The encoder of that name: `vits` (243k parameters), `vit7` (555k) or `cnn` (323k), freshly initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match name:
            case "vits":
                return Encoder(name, vit(96, 3).eval(), lr=7e-4, pretrain_lr=4e-3, pretrain_steps=1000, centred=True)
            case "vit7":
                return Encoder(name, vit(128, 4).eval(), lr=4e-4, pretrain_lr=1e-3, pretrain_steps=1500)
            case "cnn":
                return Encoder(name, cnn().eval(), lr=4e-4, pretrain_lr=1e-3, pretrain_steps=600)
            case _:
                raise ValueError(f"there is no encoder {name!r}: vits, vit7 or cnn")


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters, copied and detached: where training starts."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def features(module: nn.Module, params: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Features (n, 128) of images (n, 1, 28, 28) under the given parameters."""
    return torch.func.functional_call(module, dict(params), (images,))
