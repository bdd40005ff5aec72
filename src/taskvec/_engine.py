"""The one place where a rule is called.

`lift(inputs, rule, options)` turns a rule on tensors into one on mappings: it looks up each tensor's options, takes the
statistics that the rule's mark asks for, cuts tensors into pieces where the mark allows it, checks what comes back, and
tells which tensor an error came from. A dict in gives a dict out; anything lazy in gives a `Lazy` out, computed when
read.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from ._errors import DtypeError, OptionError, RuleError, listed
from ._lazy import Lazy, coarsest, specs_of
from ._random import key_of
from .rules import Mark, Pieces, Place, Total, cut, device_of, mark_of, piece_size, signature_of

__all__ = ["lift"]

Inputs = Sequence[dict[str, Tensor] | Lazy]

UNMARKED = Mark("tensor", {})  # an unmarked function simply gets whole tensors


def lift(
    inputs: Inputs,
    rule: Callable[..., Tensor],
    options: Mapping[str, Any],
    *,
    stacked: bool = True,
    device: torch.device | None = None,
) -> dict[str, Tensor] | Lazy:
    """Apply a rule to every tensor of one mapping, or of several stacked.

    Args:
        inputs: mappings with the same names and shapes (the caller has checked), dicts or lazy. A leaf takes one.
        rule: a rule, or a leaf if not stacked. Runs in float32 (float64 where the input is), result in the input's
            dtype.
        options: for the rule, each a value for all tensors or a mapping of patterns to values.
        stacked: whether the rule takes a stack or the tensor itself.
        device: where to compute and leave the results; by default where the inputs are.

    Returns:
        name -> result, lazy if any input is.
    """
    work = _Work(inputs, rule, options, stacked, device)
    if all(isinstance(source, dict) for source in inputs):
        return {name: work.whole(name) for name in work.specs}
    home = work.home(next(iter(work.specs))) if work.specs else device
    return Lazy(work.specs, work.read, work.grain, device=home)


class _Work:
    """A rule with everything it needs to compute any part of its result. Pickles where its parts do."""

    def __init__(
        self,
        inputs: Inputs,
        rule: Callable[..., Tensor],
        options: Mapping[str, Any],
        stacked: bool,
        device: torch.device | None,
    ) -> None:
        self.inputs, self.rule, self.stacked, self.device = tuple(inputs), rule, stacked, device
        self.specs = {
            name: spec.to("meta", dtype=_widest([specs_of(source)[name].dtype for source in inputs]))
            for name, spec in specs_of(inputs[0]).items()
        }
        self.mark = mark_of(rule) or UNMARKED
        self.options = _Options(rule, self.mark, options, list(self.specs))
        self._statistics: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # statistics over everything are taken once, before the work is sent to other processes
        filled = [name for name, spec in self.specs.items() if spec.numel()]
        if self.mark.statistics and self.options.scope == "global" and filled:
            self.statistics(filled[0])
        return self.__dict__

    def grain(self, name: str) -> int:
        """Reads at multiples of this compute nothing twice."""
        return max(coarsest(self.inputs, name), piece_size(self.specs[name], self.pieces, self.home(name)))

    def home(self, name: str) -> torch.device:
        """Where a result is computed and left."""
        return self.device or device_of(self.inputs, name)

    @property
    def pieces(self) -> Pieces:
        """What the rule is given: rows where that is the scope, else what its mark says."""
        by_row = self.options.scope == "row" and self.mark.pieces == "element"
        return "row" if by_row else self.mark.pieces

    def whole(self, name: str) -> Tensor:
        """A result."""
        return self.read(name, 0, self.specs[name].numel()).reshape(self.specs[name].shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat entries [start, stop) of a result."""
        spec = self.specs[name]
        if start >= stop:
            return torch.empty(0, dtype=spec.dtype, device=self.home(name))
        size = piece_size(spec, self.pieces, self.home(name))
        low, high = start // size * size, min(-(-stop // size) * size, spec.numel())
        kwargs = self.options.of(name) | self.statistics(name)
        beside = {key: value for key, value in kwargs.items() if _is_side_input(value, spec.shape)}
        result = torch.empty(high - low, dtype=spec.dtype, device=self.home(name))
        with torch.no_grad():
            for at, piece in self._pieces(name, low, high):
                own = piece[0] if self.stacked else piece
                given = kwargs | {key: _cut_alike(value, at.start, own) for key, value in beside.items()}
                if self.options.takes_place:
                    given["at"] = at
                first = at.start - low
                result[first : first + own.numel()] = self._call(name, piece, given).reshape(-1)
        return result[start - low : stop - low]

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[Place, Tensor]]:
        key = key_of(name)
        for at, piece in cut(
            self.inputs, name, self.pieces, key, stacked=self.stacked, device=self.device, start=start, stop=stop
        ):
            # a stack is a copy; a leaf that nobody marked may work in place, and is given one
            yield at, piece if self.stacked or self.mark is not UNMARKED else piece.clone()

    def statistics(self, name: str) -> dict[str, Any]:
        """What the mark hands in for a tensor: taken over its scope, once."""
        if not self.mark.statistics or self.options.scope == "row":
            return {}
        everywhere = self.options.scope == "global"
        where = "" if everywhere else name
        if where not in self._statistics:
            names = [n for n, spec in self.specs.items() if spec.numel()] if everywhere else [name]
            self._statistics[where] = self._take(names)
        return self._statistics[where]

    def _take(self, names: list[str]) -> dict[str, Any]:
        _check_one_width({name: self.specs[name] for name in names})
        total = Total(self.inputs, names, pieces=self.pieces, stacked=self.stacked, device=self.device)
        values = self.options.shared(self.mark.statistics, names)
        found: dict[str, Any] = {}
        with torch.no_grad():
            for key, statistic in self.mark.statistics.items():
                wanted = list(inspect.signature(statistic).parameters)[1:]
                found[key] = statistic(total, **{p: v for p, v in (values | found).items() if p in wanted})
        return found

    def _call(self, name: str, piece: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        try:
            result = self.rule(piece, **kwargs)
            _check_result(result, piece.shape[1:] if self.stacked else piece.shape)
        except Exception as error:
            what = "stack" if self.stacked else "tensor"
            doing = "merging" if self.stacked else "mapping"
            error.add_note(
                f"while {doing} {name!r}, {what} {tuple(piece.shape)} {_dtype_name(piece)} on {piece.device}"
            )
            raise
        return result


class _Options:
    """A rule's options, looked up by tensor name; unknown ones are refused at once."""

    def __init__(self, rule: Callable[..., Tensor], mark: Mark, given: Mapping[str, Any], names: list[str]) -> None:
        signature = signature_of(rule)
        parameters = {} if signature is None else dict(list(signature.parameters.items())[1:])
        hidden = {"at", *mark.statistics} if mark_of(rule) else set[str]()
        self.takes_place = "at" in hidden & parameters.keys()
        self._defaults = {
            key: parameter.default
            for key, parameter in parameters.items()
            if parameter.default is not parameter.empty and key not in hidden
        }
        self._needed = frozenset(parameters) - self._defaults.keys()
        self._given = dict(given)
        if signature is not None:
            _check_known(rule, parameters, hidden, given)
        for key, value in given.items():
            _check_patterns(key, value, names)
        scope = self._given.get("scope", self._defaults.get("scope", "tensor"))
        if isinstance(scope, Mapping):
            raise OptionError("scope cannot vary by name; select() the names and merge them apart, then join with |")
        if "scope" in parameters and scope not in ("global", "tensor", "row"):
            raise OptionError(f"scope is 'global', 'tensor' or 'row', not {scope!r}")
        self.scope: str = scope

    def of(self, name: str) -> dict[str, Any]:
        """The options of one tensor that are not left at their defaults."""
        found = {key: _lookup(value, name) for key, value in self._given.items()}
        for key, value in found.items():
            if value is _LEFT and key in self._needed:
                raise OptionError(f"no {key} for {name!r}: give every name one, the rest by '*'")
        return {key: value for key, value in found.items() if value is not _LEFT}

    def shared(self, statistics: Mapping[str, Callable[..., Any]], names: list[str]) -> dict[str, Any]:
        """The options that hold for all of the names together, for statistics over them."""
        used = {p for statistic in statistics.values() for p in inspect.signature(statistic).parameters}
        for key in used & self._given.keys():
            if isinstance(self._given[key], Mapping) and len({str(self.of(name).get(key)) for name in names}) > 1:
                raise OptionError(
                    f"{key} varies by name, but scope='global' takes one statistic over all names; "
                    f"say scope='tensor', or select() the names and merge them apart"
                )
        return self._defaults | self.of(names[0])


_LEFT = object()  # an option that no pattern gives a value for this name: the rule's default holds


def _lookup(value: Any, name: str) -> Any:
    """One tensor's value of an option: a mapping is looked up by name, then pattern; in a list, each mapping is."""
    if isinstance(value, Mapping):
        by_name = cast("Mapping[str, Any]", value)
        if name in by_name:
            return by_name[name]
        return next((by_name[pattern] for pattern in by_name if fnmatchcase(name, pattern)), _LEFT)
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if items and all(isinstance(item, Mapping) for item in items):
            found = [_lookup(item, name) for item in items]
            return _LEFT if any(item is _LEFT for item in found) else found
    return cast("Any", value)


def _check_known(
    rule: Callable[..., Tensor], parameters: Mapping[str, inspect.Parameter], hidden: set[str], given: Mapping[str, Any]
) -> None:
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    allowed = [key for key, p in parameters.items() if key not in hidden and p.kind is not p.VAR_POSITIONAL]
    title = getattr(rule, "__name__", None) or repr(rule)
    for key in given:
        if key not in allowed:
            close = get_close_matches(key, allowed, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise OptionError(f"{title} has no option {key!r}{hint}; it takes {', '.join(allowed) or 'none'}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key in allowed and key not in given:
            raise OptionError(f"{title} needs the option {key!r}; give it as {key}=...")


def _check_patterns(key: str, value: Any, names: list[str]) -> None:
    """A key of an option's mapping that matches no tensor is a misspelling. Side inputs may cover more names."""
    if not isinstance(value, dict):
        return
    patterns = cast("dict[str, Any]", value)
    if any(isinstance(item, Tensor) for item in patterns.values()):
        return
    idle = [p for p in patterns if p not in names and not any(fnmatchcase(name, p) for name in names)]
    if idle:
        raise OptionError(f"{key}: {listed(idle)} matches no tensor; there are {listed(names)}")


def _check_result(result: object, shape: torch.Size) -> None:
    if not isinstance(result, Tensor):
        raise RuleError(f"a rule returns one tensor; this one returned {type(result).__name__}")
    if result.shape != shape:
        raise RuleError(f"a rule returns the shape {tuple(shape)} here; this one returned {tuple(result.shape)}")
    if result.is_complex():
        raise RuleError("a rule returns real numbers; this one returned complex ones")


def _check_one_width(specs: Mapping[str, Tensor]) -> None:
    wide = [name for name, spec in specs.items() if spec.dtype == torch.float64]
    if wide and len(wide) < len(specs):
        raise DtypeError(
            f"{listed(wide)} is float64 and others are not: one statistic over all needs one width; "
            "use to(dtype=), or scope='tensor'"
        )


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _is_side_input(value: Any, shape: torch.Size) -> bool:
    """Whether an option is a tensor of the result's shape, or one for each vector: then it is cut as the inputs are."""
    items = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else [value]
    return len(items) > 0 and all(isinstance(item, Tensor) and item.shape == shape for item in items)


def _cut_alike(value: Any, start: int, piece: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.reshape(-1)[start : start + piece.numel()].reshape(piece.shape)
    return [_cut_alike(item, start, piece) for item in value]


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
