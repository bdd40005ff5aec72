"""The one place where a rule is called.

`lift(sources, rule, options)` turns a rule on tensors into a source: it looks up each tensor's options, takes the
statistics that the rule's mark asks for, cuts tensors into pieces where the mark allows it, checks what comes back, and
tells which tensor an error came from. Of tensors in memory the result is computed at once.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import DtypeError, OptionError, RuleError
from .marks import Mark, mark_of, signature_of
from .names import ABSENT, listed, option_for, unmatched
from .pieces import Look, Pieces, Place, Statistic, piece_size, shaped, spans
from .random import key_of
from .run import Stack, collect
from .sources import Memory, Pull, Source, Spec, frozen, remembered, widest
from .transfers import moved_to

__all__ = ["Ruled", "lift"]


def lift(
    sources: Sequence[Source],
    rule: Callable[..., Tensor],
    options: Mapping[str, Any],
    *,
    stacked: bool = True,
    device: torch.device | None = None,
) -> Source:
    """Apply a rule to every tensor of one source, or of several stacked.

    Args:
        sources: with the same names and shapes (the caller has checked). A leaf takes one.
        rule: a rule, or a leaf if not stacked. Runs in float32 (float64 where the input is), result in the input's
            dtype.
        options: for the rule, each a value for all tensors or a mapping of patterns to values.
        stacked: whether the rule takes a stack or the tensor itself.
        device: where to compute and leave the results; by default where the inputs are.

    Returns:
        The results, in memory if all sources are.
    """
    ruled = Ruled(rule, sources, options, stacked=stacked, device=device)
    if all(isinstance(source, Memory) for source in sources):
        return Memory(collect(ruled, list(ruled.specs)))
    return ruled


class Ruled(Stack):
    """A rule with everything it needs to compute any part of its result."""

    def __init__(
        self,
        rule: Callable[..., Tensor],
        sources: Sequence[Source],
        options: Mapping[str, Any],
        *,
        stacked: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sources, device)
        self.rule, self.stacked = rule, stacked
        self.specs = {
            name: Spec(spec.shape, widest(source.specs[name].dtype for source in sources))
            for name, spec in sources[0].specs.items()
        }
        self.mark = mark_of(rule) or Mark()
        self.threads = mark_of(rule) is not None  # other people's functions are called in one thread, in order
        self.options = Options(rule, options, list(self.specs))
        self.known: dict[str, dict[Statistic, Any]] = {}
        self._begun: dict[str, Begun] = {}

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_begun": {}}  # another process begins its own

    @override
    def key(self) -> Any:
        given = tuple((key, frozen(value)) for key, value in sorted(self.options.given.items()))
        return self.rule_key(), self.sources, self.stacked, self._device, given

    def rule_key(self) -> Any:
        """What the rule is: partials compare by what they hold."""
        rule, layers = self.rule, list[Any]()
        while isinstance(rule, partial):
            layers.append((frozen(rule.args), frozen(rule.keywords)))
            rule = rule.func
        return id(rule), tuple(layers)

    @property
    def pieces(self) -> Pieces:
        """What the rule is given: rows where that is the scope, else what its mark says."""
        by_row = self.options.scope == "row" and self.mark.pieces == "element"
        return "row" if by_row else self.mark.pieces

    @remembered
    def piece(self, name: str) -> int:
        """Entries in one piece of a tensor."""
        return piece_size(self.specs[name], self.pieces, self.device(name))

    @override
    @remembered
    def grain(self, name: str) -> int:
        return max(super().grain(name), self.piece(name))

    @override
    def block(self, pull: Pull) -> Tensor:
        size, start, stop = self.piece(pull.name), pull.start, pull.stop
        low, high = start // size * size, min(-(-stop // size) * size, self.specs[pull.name].entries)
        if (low, high) == (start, stop) and stop - start <= size:
            return self._piece(pull)
        # a rule is given the library's own pieces, whatever the run that is asked for
        parts = [self._piece(pull.apart(*span)) for span in spans(low, high, size)]
        return torch.cat(parts)[start - low : stop - low]

    def _piece(self, pull: Pull) -> Tensor:
        spec = self.specs[pull.name]
        if self.stacked:
            x = self.stack(pull, self.pieces)
        else:
            # a stack is a copy; an unmarked leaf may work in place, and is given one too
            own = moved_to(pull(self.sources[0]).detach(), self.device(pull.name), self.wide(pull.name))
            x = shaped((own if self.threads else own.clone())[None], spec, self.pieces)[0]
        kwargs = self.options.of(pull.name)
        shape = x.shape[1:] if self.stacked else x.shape
        given = {key: _cut_alike(value, spec, pull.start, shape) for key, value in kwargs.items()}
        if self.options.takes_place:
            known = self.known.get(self._scope(pull.name), {})
            given["at"] = Place(key_of(pull.name), pull.start, known)
        return self._call(pull.name, x, given, shape).reshape(-1).to(spec.dtype)

    def _call(self, name: str, x: Tensor, kwargs: Mapping[str, Any], shape: torch.Size) -> Tensor:
        try:
            result = self.rule(x, **kwargs)
            _check_result(result, shape)
        except Exception as error:
            doing, what = ("merging", "stack") if self.stacked else ("mapping", "tensor")
            error.add_note(
                f"while {doing} {name!r}, {what} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
            )
            raise
        return result

    # statistics

    def _scope(self, name: str) -> str:
        return "" if self.options.scope == "global" else name

    @override
    def wants(self, name: str) -> tuple[str, ...]:
        if not self.mark.statistics or self.options.scope == "row" or self._scope(name) in self.known:
            return ()
        names = self.specs if self.options.scope == "global" else [name]
        filled = tuple(own for own in names if self.specs[own].entries)
        return filled if filled and self._begin(filled) is not None else ()

    @override
    def passes(self, names: Sequence[str]) -> Generator[Look, list[Any], None]:
        begun = self._begin(names)
        self._begun.pop(self._scope(names[0]), None)
        while begun is not None:
            found = yield begun.look
            begun = _going_on(begun.passes, found)

    def _begin(self, names: Sequence[str]) -> "Begun | None":
        """The statistics over some names at their first pass; None if they are known, or known at once.

        What reads nothing, such as the cut at density 1, is known at once: no tensor has to wait for the others.
        """
        scope = self._scope(names[0])
        begun = self._begun.get(scope)
        if begun is None and scope not in self.known and (begun := _going_on(self._take(names), None)) is not None:
            self._begun[scope] = begun
        return begun

    def _take(self, names: Sequence[str]) -> Generator[Look, list[Any], None]:
        self._check_one_width(names)
        values = self.options.shared(self.mark.statistics, names)
        entries = sum(self.specs[name].entries for name in names)
        found: dict[Statistic, Any] = {}
        for statistic in self.mark.statistics:
            earlier = {own.__name__: value for own, value in found.items()}
            wanted = list(inspect.signature(statistic).parameters)[2:]
            given = {key: value for key, value in (values | earlier).items() if key in wanted}
            found[statistic] = yield from statistic(len(self.sources), entries, **given)
        self.known[self._scope(names[0])] = found

    @override
    def told(self, name: str) -> Any:
        return self.known.get(self._scope(name))

    @override
    def learn(self, name: str, known: Any) -> None:
        self.known[self._scope(name)] = known

    def _check_one_width(self, names: Sequence[str]) -> None:
        wide = [name for name in names if self.wide(name) == torch.float64]
        if wide and len(wide) < len(names):
            raise DtypeError(
                f"{listed(wide)} is float64 and others are not: one statistic over all needs one width; "
                "use to(dtype=), or scope='tensor'"
            )


class Begun(NamedTuple):
    """Passes of which one has been asked for."""

    passes: Generator[Look, list[Any], None]
    look: Look


def _going_on(passes: Generator[Look, list[Any], None], found: list[Any] | None) -> Begun | None:
    """Send passes what they asked for; None at their end."""
    try:
        return Begun(passes, passes.send(found))  # type: ignore[arg-type]
    except StopIteration:
        return None


class Options:
    """A rule's options, looked up by tensor name; unknown ones are refused at once."""

    def __init__(self, rule: Callable[..., Tensor], given: Mapping[str, Any], names: list[str]) -> None:
        signature = signature_of(rule)
        parameters = {} if signature is None else dict(list(signature.parameters.items())[1:])
        hidden = {"at"} if mark_of(rule) else set[str]()
        self.takes_place = "at" in hidden & parameters.keys()
        self._defaults = {
            key: parameter.default
            for key, parameter in parameters.items()
            if parameter.default is not parameter.empty and key not in hidden
        }
        self._needed = frozenset(parameters) - self._defaults.keys() - hidden
        self.given = dict(given)
        self._found: dict[str, dict[str, Any]] = {}
        if signature is not None:
            _check_known(rule, parameters, hidden, given)
        for key, value in given.items():
            _check_patterns(key, value, names)
        scope = self.given.get("scope", self._defaults.get("scope", "tensor"))
        if isinstance(scope, Mapping):
            raise OptionError("scope cannot vary by name; select() the names and merge them apart, then join with |")
        if "scope" in parameters and scope not in ("global", "tensor", "row"):
            raise OptionError(f"scope must be 'global', 'tensor' or 'row'; got {scope!r}")
        self.scope: str = scope

    def of(self, name: str) -> dict[str, Any]:
        """The options of one tensor that are not left at their defaults."""
        known = self._found.get(name)
        if known is not None:
            return known
        found = {key: option_for(value, name) for key, value in self.given.items()}
        for key, value in found.items():
            if value is ABSENT and key in self._needed:
                raise OptionError(f"there is no {key} for {name!r}; give every name one, the rest by '*'")
        found = {key: value for key, value in found.items() if value is not ABSENT}
        # the tensors at hand only: an option may be a lazy vector, whose tensors are large
        self._found = {**dict(list(self._found.items())[-3:]), name: found}
        return found

    def shared(self, statistics: Sequence[Statistic], names: Sequence[str]) -> dict[str, Any]:
        """The options that hold for all of the names together, for statistics over them."""
        used = {p for statistic in statistics for p in inspect.signature(statistic).parameters}
        for key in used & self.given.keys():
            if isinstance(self.given[key], Mapping) and len({str(self.of(name).get(key)) for name in names}) > 1:
                raise OptionError(
                    f"{key} varies by name, but scope='global' takes one statistic over all names; "
                    f"say scope='tensor', or select() the names and merge them apart"
                )
        return self._defaults | self.of(names[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": {}}


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
    if idle := unmatched(patterns, names):
        raise OptionError(f"{key}: {listed(idle)} matches no tensor; there are {listed(names)}")


def _check_result(result: object, shape: torch.Size) -> None:
    if not isinstance(result, Tensor):
        raise RuleError(f"a rule must return one tensor; this one returned {type(result).__name__}")
    if result.shape != shape:
        raise RuleError(f"a rule must return the shape {tuple(shape)} here; this one returned {tuple(result.shape)}")
    if result.is_complex():
        raise RuleError("a rule must return real numbers; this one returned complex ones")


def _cut_alike(value: Any, spec: Spec, start: int, shape: torch.Size) -> Any:
    """An option that is a tensor of the result's shape, or one per vector, cut as the inputs are."""
    items = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, Tensor) and tuple(item.shape) == spec.shape for item in items):
        return cast("Any", value)
    cut = [item.reshape(-1)[start : start + shape.numel()].reshape(shape) for item in items]
    return cut if isinstance(value, list | tuple) else cut[0]
