"""BackdoorVector: what a backdoor is in weights."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from .._engine.names import Patterns
from .._engine.run import measure
from ..errors import DegenerateError
from .arithmetic import Scale
from .fingerprint import VALUES, fingerprint
from .measures import changed
from .model import as_model
from .vector import TaskVector

__all__ = ["BackdoorVector"]


class BackdoorVector(TaskVector):
    """The vector from a clean fine-tune to a backdoored one of the same task and base: `BV = backdoored - clean`.

    Adding it to a clean model injects the backdoor, subtracting it from a backdoored one removes it. It is a
    `TaskVector` in all else.

    Examples:
        >>> clean, backdoored = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.5])}
        >>> bv = BackdoorVector.between(clean=clean, backdoored=backdoored)
        >>> bv.inject(clean)["w"], bv.remove(backdoored)["w"]
        (tensor([1.0000, 2.5000]), tensor([1., 2.]))

    References:
        [Pawlak et al., Backdoor Vectors, 2025](https://arxiv.org/abs/2510.08016)
    """

    @override
    @classmethod
    def between(  # pyright: ignore[reportIncompatibleMethodOverride] - its models have names of their own
        cls,
        clean: Mapping[str, Tensor],
        backdoored: Mapping[str, Tensor],
        *,
        pretrained: Mapping[str, Tensor] | None = None,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The backdoor vector of a backdoored model and its clean twin.

        The twin should differ in the poison alone: same base, data and task. Two vectors that share a clean twin look
        more alike than their backdoors are, so give each its own.

        Args:
            clean: the clean fine-tune.
            backdoored: the backdoored fine-tune, with the same names and shapes.
            pretrained: the model both were fine-tuned from. Its fingerprint is kept, and vectors of other bases are
                then refused in arithmetic with this one; without it names, shapes and dtypes are compared only.
            include: as in `TaskVector.between`.
            exclude: as in `TaskVector.between`.
            dtype: as in `TaskVector.between`.

        Returns:
            A vector, lazy if either model is.

        Raises:
            DegenerateError: the two models are equal: the backdoored checkpoint holds no backdoor.
            MismatchError: names or shapes differ.
        """
        vector = cls._between(("clean", clean), ("backdoored", backdoored), include, exclude, dtype)
        if not _any_difference(vector):
            raise DegenerateError(
                "clean and backdoored are equal: there is no backdoor in this checkpoint; was the right one saved?"
            )
        known = (
            fingerprint(as_model("clean", clean), values=False)
            if pretrained is None
            else fingerprint(as_model("pretrained", pretrained))
        )
        rest = {key: value for key, value in vector.meta.items() if key != VALUES}
        return cls(vector.tensors, meta=rest | known)

    def inject(self, model: Mapping[str, Tensor], scale: Scale = 1.0) -> Mapping[str, Tensor]:
        """The model with the backdoor added: `model + scale * BV`, as `TaskVector.apply`.

        Args:
            model: any model with the vector's names: the clean twin, another fine-tune, a merge.
            scale: as in `apply`.
        """
        return self.apply(model, scale)

    def remove(self, model: Mapping[str, Tensor], scale: Scale = 1.0) -> Mapping[str, Tensor]:
        """The model with the backdoor subtracted: `model - scale * BV`.

        Args:
            model: any model with the vector's names.
            scale: as in `apply`.
        """
        return (-self).apply(model, scale)


def _any_difference(vector: TaskVector) -> bool:
    """Whether any entry is not zero; reads no further than the first such tensor."""
    return any(measure([vector.source], [name], changed) for name in vector if vector.source.specs[name].entries)
