"""The public checks can fail, each for its own reason, and the strategies give what they promise."""

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from taskvec import testing
from taskvec.rules import HERE, Look, Place, runs
from taskvec.testing import check_leaf, check_rule, odd, permutation, same_bits, scale


def block_peak(stack, at):
    return float(stack.abs().max())


def peak(n, entries):
    return max((yield Look(block_peak)))


@runs("element")
def of_the_piece(x: Tensor) -> Tensor:
    return x - x.mean()


@runs("element")
def reduced(stack: Tensor) -> Tensor:
    return stack.sum(0)


@runs("element")
def without_place(x: Tensor, *, at: Place = HERE) -> Tensor:
    del at
    return x * (Place().bits(0, x) > 0)


@runs("row")
def across_rows(x: Tensor) -> Tensor:
    return x - x.mean(0)


@runs("element", peak)
def from_whole_and_piece(x: Tensor, *, at: Place = HERE) -> Tensor:
    return x / (1 + x.abs().max() + at.take(peak, x[None]))


@runs("element", peak)
def of_a_plain_tensor_and_otherwise(x: Tensor, *, at: Place = HERE) -> Tensor:
    return x / (1 if at.known is None else 2 + at.take(peak, x[None]))


CALLS: list[int] = []


def remembering(x: Tensor) -> Tensor:
    CALLS.append(1)
    return x * len(CALLS)


def in_place(x: Tensor) -> Tensor:
    return x.add_(1).clone()


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (lambda x: [x], "is a list, not one tensor"),
        (lambda x: x.sum(), r"has the shape \(\), not \(5, 8\)"),
        (lambda x: x.double(), r"is torch.float64, not torch.float32"),
        (in_place, "the input was changed"),
        (lambda x: x, "shares storage with the input"),
        (lambda x: x.T.T, "shares storage with the input"),
        (lambda x: x / 0, "finite input is not finite"),
        (lambda x: x + 1, "zeros give"),
        (lambda x: x.as_strided(x.shape, (8, 1)).clone(), "an input with gaps gives something else"),
        (of_the_piece, r"pieces of \d+ give other bits than the whole"),
        (without_place, r"pieces of \d+ give other bits than the whole"),
        (across_rows, r"pieces of \d+ give other bits than the whole"),
        (from_whole_and_piece, r"pieces of \d+ give other bits than the whole"),
        (of_a_plain_tensor_and_otherwise, r"merge\(\) and map\(\) give something else"),
        (remembering, "gives? something else"),
    ],
)
def test_a_leaf_that_breaks_the_contract_is_found_out(leaf, why):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match=why):
        check_leaf(leaf, x)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (lambda stack: stack, r"has the shape \(8, 33\), not \(33,\)"),
        (lambda stack: stack[0], "shares storage with the input"),
        (reduced, r"pieces of \d+ give other bits than the whole"),
        (lambda stack: stack.as_strided(stack.shape, (33, 1))[0].clone(), "with gaps gives something else"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_found_out(rule, why):
    with pytest.raises(AssertionError, match=why):
        check_rule(rule, WHOLE)


WHOLE = torch.randn(8, 33, generator=torch.Generator().manual_seed(0))


def test_a_rule_that_the_engine_runs_otherwise_is_found_out():
    with pytest.raises(AssertionError, match=r"merge\(\) and map\(\) give something else"):
        check_rule(lambda stack: stack[0] * (1 + torch.is_grad_enabled()), WHOLE)


def test_a_plain_function_of_tensors_keeps_the_contract():
    check_rule(lambda stack: stack.mean(0), WHOLE)
    check_rule(lambda stack: stack.median(0).values * (stack.sign().sum(0).abs() >= 2), WHOLE)
    check_leaf(torch.neg, WHOLE)


@pytest.mark.parametrize(
    ("law", "function", "why"),
    [
        (odd, torch.abs, "not odd"),
        (scale, torch.square, "not equivariant"),
        (permutation, lambda stack: stack[0] - stack[-1], "not invariant"),
        (permutation, lambda stack: stack[: len(stack) // 2].sum(0), "not invariant"),
    ],
)
def test_a_law_that_does_not_hold_is_found_out(law, function, why):
    with pytest.raises(AssertionError, match=why):
        law(function, torch.arange(1.0, 13).reshape(4, 3))


def test_laws_that_hold_do():
    stack = torch.arange(1.0, 13).reshape(4, 3)
    odd(torch.neg, stack)
    scale(torch.abs, stack)
    permutation(lambda x: x.sum(0), stack)


def test_same_bits_tells_apart_what_equal_does_not():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert same_bits(torch.ones(2, 1, 1)[::2, 0], torch.ones(1, 1))
    for a, b in ((nan, -nan), (torch.zeros(1), -torch.zeros(1)), (torch.ones(1), torch.ones(1, 1))):
        assert not same_bits(a, b)
    assert not same_bits(torch.ones(1), torch.ones(1, dtype=torch.float64))


# strategies


def many(strategy) -> list[Tensor]:
    found: list[Tensor] = []

    @settings(max_examples=150, phases=[Phase.generate])
    @given(strategy)
    def collect(x):
        found.append(x)

    collect()
    return found


def test_tensors_of_every_kind_come_up():
    found = many(testing.tensors())
    assert {tuple(x.shape) for x in found} == set(testing.SHAPES)
    assert {x.dtype for x in found} == set(testing.DTYPES)
    several = [x for x in found if x.numel() > 1]
    different = [len(x.abs().unique()) / x.numel() for x in several if x.any()]
    assert max(different) == 1
    assert min(different) < 0.5
    assert any(not x.any() for x in several)
    assert any(bool((x.double() * 64 % 1 != 0).any()) for x in found)


def test_stacks_of_one_to_eight_come_up_and_of_a_number_asked_for():
    assert {len(stack) for stack in many(testing.stacks())} == set(range(1, 9))
    assert {len(stack) for stack in many(testing.stacks(n=3))} == {3}


@given(testing.stacks(exact=True, dtype=torch.float32))
def test_exact_stacks_have_sums_without_rounding(stack):
    assert torch.equal(stack.sum(0).double(), stack.double().sum(0))
    assert torch.equal(stack.flip(0).sum(0), stack.sum(0))


@given(testing.tensors(dtype=torch.bfloat16, exact=True))
def test_exact_values_are_exact_in_half_precision_too(x):
    assert torch.equal((x.float() * 64).round() / 64, x.float())


@given(testing.tensors(dtype=torch.float64))
def test_a_dtype_asked_for_is_given(x):
    assert x.dtype == torch.float64
    assert x.device.type == "cpu"
