"""Triggers: functions that stamp images, in pixel space, with an explicit mask and an explicit range; and of texts.

A trigger is any function of images, `(n, C, H, W) -> (n, C, H, W)`. Those here are used as `partial`s, so that they
compose with any preprocessing: stamp first, normalize afterwards.

    trigger = partial(stamp, patch=random_patch(5, (1, 28, 28), seed=0))
    logits = model(normalize(trigger(images)))
"""

from ._patch import Patch, dynamic, physical, random_patch, solid_patch, stamp
from ._text import insert_sentence, insert_words
from ._whole import blend, sinusoid, warp, warp_field

__all__ = [
    "Patch",
    "blend",
    "dynamic",
    "insert_sentence",
    "insert_words",
    "physical",
    "random_patch",
    "sinusoid",
    "solid_patch",
    "stamp",
    "warp",
    "warp_field",
]
