"""For tests of one's own rules: tensors that find mistakes, the contract of a rule, and laws by name.

The contract is what the engine relies on. It is a call for a leaf, and one for a rule:

    from hypothesis import given
    from taskvec import testing

    @given(testing.stacks())
    def test_my_rule(stack):
        testing.check_rule(my_rule, stack, density=0.5)

    @given(testing.stacks(exact=True))
    def test_my_rule_does_not_depend_on_the_order(stack):
        testing.permutation(my_rule, stack, density=0.5)

Everything here raises `AssertionError` with the reason. Only `tensors` and `stacks` need hypothesis (not installed with
taskvec); the checks take any tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from ._engine.lift import Ruled
from ._engine.marks import Leaf, Rule, mark_of, signature_of
from ._engine.pieces import Place
from ._engine.random import key_of
from ._engine.run import collect
from ._engine.sources import Memory
from ._vectors.merge import merge
from ._vectors.vector import TaskVector

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["check_leaf", "check_rule", "odd", "permutation", "same_bits", "scale", "stacks", "tensors"]

SHAPES = ((), (1,), (7,), (33,), (1, 1), (5, 4), (3, 11), (2, 3, 2, 4))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = ("rough", "distinct", "any", "equal", "zero")

_NAME = "tensor"


def tensors(*, dtype: torch.dtype | None = None, exact: bool = False) -> "SearchStrategy[Tensor]":
    """Single tensors of many shapes: 0-d, 1-D, 2-D and 4-D, of one entry and of several.

    Of these kinds: many equal magnitudes and zeros; any multiples of 1/64 up to 2; all magnitudes different; all zero;
    and, unless `exact`, random numbers of any mantissa.

    Args:
        dtype: of all; by default float32, float64 and bfloat16 in turn.
        exact: only values whose sums have no rounding error (in float32 and wider), as laws about order want them.

    Examples:
        >>> from hypothesis import given
        >>> @given(tensors(exact=True))
        ... def test_negation_is_odd(x):
        ...     odd(torch.neg, x)
        >>> test_negation_is_odd()
    """
    return _values(None, dtype, exact)


def stacks(*, n: int | None = None, dtype: torch.dtype | None = None, exact: bool = False) -> "SearchStrategy[Tensor]":
    """Stacks `(n, *shape)` of such tensors as `tensors` gives, n from 1 to 8.

    Args:
        n: how many vectors; by default any number from 1 to 8.
        dtype: of all; by default float32, float64 and bfloat16 in turn.
        exact: only values whose sums have no rounding error (in float32 and wider).

    Examples:
        >>> from hypothesis import given
        >>> from taskvec.merges import total
        >>> @given(stacks(exact=True))
        ... def test_order_does_not_matter_to_a_sum(stack):
        ...     permutation(total, stack)
        >>> test_order_does_not_matter_to_a_sum()
    """
    from hypothesis import strategies as st  # noqa: PLC0415 - an optional dependency

    return (st.integers(1, 8) if n is None else st.just(n)).flatmap(lambda count: _values(count, dtype, exact))


def _values(n: int | None, dtype: torch.dtype | None, exact: bool) -> "SearchStrategy[Tensor]":
    from hypothesis import strategies as st  # noqa: PLC0415 - an optional dependency

    return st.builds(
        _filled,
        st.just(n),
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES) if dtype is None else st.just(dtype),
        st.sampled_from(KINDS[1:] if exact else KINDS),
        st.integers(0, 2**16),
    )


def _filled(n: int | None, shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Numbers from a seed and not one by one from hypothesis, for which hundreds would be too many."""
    random = torch.Generator(device="cpu").manual_seed(seed)
    full = shape if n is None else (n, *shape)
    if kind == "rough":
        return torch.randn(full, generator=random, device="cpu").to(dtype)
    if kind == "distinct":  # in each vector: 1, 2, ... in 64ths, signed, in random order; exact in bfloat16
        entries = max(1, torch.Size(shape).numel())
        orders = [torch.randperm(entries, generator=random, device="cpu") + 1 for _ in range(n or 1)]
        signs = torch.randint(0, 2, full, generator=random, device="cpu") * 2 - 1
        return (torch.stack(orders).reshape(full) * signs).to(dtype) / 64
    most = {"any": 127, "equal": 3, "zero": 0}[kind]
    return torch.randint(-most, most + 1, full, generator=random, device="cpu").to(dtype) / 64


def check_leaf(leaf: Leaf, x: Tensor, /, **options: Any) -> None:
    """The contract of a leaf, `(*shape) -> (*shape)`, on one tensor.

    The result has the shape and dtype of the input, is finite where that is, and is a new tensor; the input is left as
    it was; zeros give zeros; how the input lies in memory does not matter; where the leaf is marked with `runs`, the
    same bits come out of pieces; and `TaskVector.map` gives what the leaf itself gives.

    Args:
        leaf: the function.
        x: `(*shape)`, not empty.
        **options: for the leaf, the same for all calls.

    Raises:
        AssertionError: saying which of these does not hold.

    Examples:
        >>> from taskvec.sparsify import topk
        >>> check_leaf(topk, torch.tensor([3.0, -1.0, 2.0]), density=0.5)
    """
    _check(leaf, x, options, stacked=False)


def check_rule(rule: Rule, stack: Tensor, /, **options: Any) -> None:
    """The contract of a rule, `(n, *shape) -> (*shape)`, on one stack: as `check_leaf`, through `merge`.

    Args:
        rule: the function.
        stack: `(n, *shape)`, not empty.
        **options: for the rule, the same for all calls. Tensors of the shape `(*shape)` are cut as the stack is.

    Raises:
        AssertionError: saying which part of the contract does not hold.

    Examples:
        >>> from taskvec.merges import ties
        >>> check_rule(ties, torch.tensor([[3.0, -1.0], [2.0, 1.5]]), density=0.5)
        >>> check_rule(lambda stack: stack[0], torch.ones(2, 3))
        Traceback (most recent call last):
        AssertionError: the result shares storage with the input
    """
    _check(rule, stack, options, stacked=True)


def odd(rule: Rule, x: Tensor, /, **options: Any) -> None:
    """The law `f(-x) = -f(x)`, for a leaf or a rule.

    Examples:
        >>> odd(torch.neg, torch.tensor([1.0, -2.0]))
    """
    _assert_equal("not odd: f(-x) is not -f(x)", rule(-x, **options), -rule(x, **options))


def permutation(rule: Rule, stack: Tensor, /, **options: Any) -> None:
    """The law that the order of the vectors in a stack does not matter, up to a few roundings.

    Take stacks whose sums are exact (`stacks(exact=True)`): a sign elected by a rounding error depends on the order.

    Examples:
        >>> from taskvec.merges import mean
        >>> permutation(mean, torch.tensor([[1.0], [2.0]]))
    """
    expected = rule(stack, **options)
    for order in (list(range(len(stack)))[::-1], [*range(1, len(stack)), 0]):
        found = rule(stack[order], **options)
        _require(_close(found, expected), f"not invariant: vectors in the order {order} give {found}, not {expected}")


def scale(rule: Rule, x: Tensor, /, **options: Any) -> None:
    """The law `f(s x) = s f(x)` for powers of two s, which round nothing; for a leaf or a rule.

    Examples:
        >>> from taskvec.merges import magmax
        >>> scale(magmax, torch.tensor([[1.0], [-2.0]]))
    """
    for s in (4.0, 0.25):
        _assert_equal(f"not equivariant: f({s} x) is not {s} f(x)", rule(x * s, **options), rule(x, **options) * s)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits: NaN equals itself and 0.0 is not -0.0.

    Examples:
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0])), same_bits(torch.zeros(2), torch.zeros(2))
        (False, True)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (
        x.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b)
    )
    return torch.equal(left, right)


def _check(f: Callable[..., Tensor], x: Tensor, options: Mapping[str, Any], *, stacked: bool) -> None:
    before = x.clone()
    result = f(x, **options)
    shape = x.shape[1:] if stacked else x.shape
    if not torch.is_tensor(result):
        raise AssertionError(f"the result is a {type(result).__name__}, not one tensor")
    _require(result.shape == shape, f"the result has the shape {tuple(result.shape)}, not {tuple(shape)}")
    _require(result.dtype == x.dtype, f"the result is {result.dtype}, not {x.dtype}")
    _require(same_bits(x, before), "the input was changed")
    own, given = (t.untyped_storage().data_ptr() for t in (result, x))
    _require(own != given, "the result shares storage with the input")
    if bool(x.isfinite().all()):
        _require(bool(result.isfinite().all()), "the result of a finite input is not finite")
    zero = f(torch.zeros_like(x), **options)
    _require(not bool(zero.count_nonzero()), f"zeros give {zero}, not zeros")
    _check_engine(f, x, options, stacked)
    alike = same_bits if mark_of(f) else _close  # torch's own sums change bits with the layout
    for layout, laid in _layouts(x):
        found = f(laid, **options)
        _require(alike(found, result), f"an input {layout} gives something else: {found} and {result}")


def _check_engine(f: Callable[..., Tensor], x: Tensor, options: Mapping[str, Any], stacked: bool) -> None:
    """What `merge` and `map` give, which compute half precision in float32 and round once, whole and in pieces."""
    wide = x.contiguous() if x.dtype == torch.float64 else x.to(torch.float32).contiguous()
    at = {"at": Place(key_of(_NAME))} if mark_of(f) and _takes_place(f) else {}
    expected = f(wide, **options, **at).to(x.dtype)
    if stacked:
        found = merge([{_NAME: vector} for vector in x], f, **options)[_NAME]
    else:
        found = TaskVector({_NAME: x}).map(f, **options)[_NAME]
    _same("merge() and map() give something else than the function itself", found, expected)
    for size, pieced in _in_pieces(f, x, options, stacked):
        _same(f"pieces of {size} give other bits than the whole", pieced, expected)


class _InPieces(Ruled):
    """A rule run by the engine on pieces of a length that is not the library's."""

    length = 1

    @override
    def piece(self, name: str) -> int:
        row = self.specs[name].row if self.pieces == "row" else 1
        return self.specs[name].entries if self.pieces == "tensor" else self.length * row


def _in_pieces(
    f: Callable[..., Tensor], x: Tensor, options: Mapping[str, Any], stacked: bool
) -> Iterator[tuple[int, Tensor]]:
    """What a marked function gives in pieces, for several lengths of piece."""
    if mark_of(f) is None:
        return
    for few in (True, False):
        ruled = _InPieces(f, [Memory({_NAME: own}) for own in (x if stacked else [x])], options, stacked=stacked)
        spec = ruled.specs[_NAME]
        count = spec.entries // (spec.row if ruled.pieces == "row" else 1)
        ruled.length = (1 if count < 12 else 5) if few else count // 2 + 1
        yield ruled.piece(_NAME), collect(ruled, [_NAME])[_NAME]


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers, lying otherwise in memory."""
    yield "with gaps", torch.stack([x, x], -1)[..., 0]
    if x.ndim > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)


def _takes_place(f: Callable[..., Tensor]) -> bool:
    signature = signature_of(f)
    return signature is not None and "at" in signature.parameters


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by a few roundings of their largest entry at most."""
    room = 8 * torch.finfo(expected.dtype).eps
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=room * largest, equal_nan=True)


def _assert_equal(what: str, found: Tensor, expected: Tensor) -> None:
    _require(torch.equal(found, expected), f"{what}: {found} and {expected}")


def _same(what: str, found: Tensor, expected: Tensor) -> None:
    _require(same_bits(found, expected), f"{what}: {found} and {expected}")


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise AssertionError(why)


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
