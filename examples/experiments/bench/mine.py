"""An attack, merge or defense of your own: one function in a file, named as `mine.py:trim` on the command line.

def trim(model, base, strength):        # a defense: of the merged model, the base, and a strength, 0 = untouched
    return TaskVector.between(base, model).map(topk, density=1 - strength).apply(base)

def louder(vector, clean):              # an attack: of a BadNets backdoor vector and its clean twin, to a model
    return vector.inject(clean, 2.0)

def middle(stack):                      # a merge: a rule for taskvec.merge; applied at the scale 1, or at middle.scale
    return stack.median(0).values
"""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from . import attackers, handed, zoo
from .defenders import DEFENCES, TWINS, Defence, Scene
from .handed import ATTACKERS, Attacker, Handed
from .merges import RULES, Rule, by
from .training import Params

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def is_mine(name: str) -> bool:
    """Whether a name is that of a function in a file."""
    return ".py:" in name


@cache
def function(name: str) -> Callable[..., Any]:
    """The function of `path.py:name`."""
    path, _, own = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"mine {Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise SystemExit(f"there is no Python file {path!r}; name a function as path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, own, None)):
        raise SystemExit(f"{path!r} has no function {own!r}")
    return getattr(module, own)


def defence(name: str) -> Defence:
    """A defense of the study, or one of your own."""
    return yours(name, _whole) if is_mine(name) else DEFENCES[name]


def _whole(scene: Scene) -> tuple[Params, Params]:
    return scene.whole, zoo.base(scene.setting)


def yours(name: str, parts: Callable[[Any], tuple[Mapping[str, Tensor], Params]]) -> Defence:
    """A defense of your own, of a scene's merged model and base; its strengths may be an attribute of the function."""
    own = function(name)
    return Defence("the base", partial(_defended, own=own, parts=parts), tuple(getattr(own, "strengths", STRENGTHS)))


def _defended(scene: Any, by: float, *, own: Callable[..., Params], parts: Callable[[Any], Any]) -> Params:
    return dict(own(*parts(scene), by))


def attacker(name: str) -> Attacker:
    """An attacker of the study, or one of your own."""
    return partial(_handed_in, own=function(name)) if is_mine(name) else ATTACKERS[name]


def _handed_in(setting: zoo.Setting, task: str, target: int, seed: int, *, own: Callable[..., Params]) -> Handed:
    plan = attackers.plain(task, target, seed)._replace(rows=handed.ROWS)
    clean = zoo.fine_tuned(setting, zoo.Recipe(task, seed, handed.ROWS))
    return Handed({task: dict(own(attackers.backdoor_vector(setting, plan), clean))}, plan)


def rule(name: str) -> Rule:
    """A merge of the study, or one of your own."""
    if not is_mine(name):
        return RULES[name]
    own = function(name)
    return Rule(partial(by, rule=own), float(getattr(own, "scale", 1.0)))


def is_twin(name: str) -> bool:
    """Whether a row is that of a twin of the probe."""
    return name in TWINS
