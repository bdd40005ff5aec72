"""Triggers for images: any function `(n, C, H, W) -> (n, C, H, W)`, in pixel space.

The patches here are used through `partial(stamp, patch=...)`, so they compose with your own preprocessing: stamp first,
normalize afterwards.

    trigger = partial(stamp, patch=random_patch(5, (1, 28, 28), seed=0))
    logits = model(normalize(trigger(images)))
"""

from ._patch import Patch as Patch
from ._patch import dynamic as dynamic
from ._patch import physical as physical
from ._patch import random_patch as random_patch
from ._patch import solid_patch as solid_patch
from ._patch import stamp as stamp
from ._whole import blend as blend
from ._whole import sinusoid as sinusoid
from ._whole import warp as warp
from ._whole import warp_field as warp_field

__all__ = [
    "Patch",
    "blend",
    "dynamic",
    "physical",
    "random_patch",
    "sinusoid",
    "solid_patch",
    "stamp",
    "warp",
    "warp_field",
]
