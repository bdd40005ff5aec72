"""Task-vector primitives: arithmetic, sparsification and merging of model weights, and backdoor vectors on top.

from taskvec import TaskVector, merge, load, save
from taskvec.merges import ties

base, *tuned = map(load, ["base.safetensors", "mnist.safetensors", "svhn.safetensors"])
vectors = [TaskVector.between(base, t) for t in tuned]
merge(vectors, ties, density=0.2).apply(base)
"""

from . import attacks as attacks
from . import calibration as calibration
from . import defenses as defenses
from . import errors as errors
from . import merges as merges
from . import metrics as metrics
from . import per_task as per_task
from . import presets as presets
from . import rebase as rebase
from . import rules as rules
from . import schedules as schedules
from . import signs as signs
from . import sparsify as sparsify
from ._files.load import load as load
from ._files.save import peak_memory as peak_memory
from ._files.save import save as save
from ._files.save_adapter import save_adapter as save_adapter
from ._vectors.backdoor import BackdoorVector as BackdoorVector
from ._vectors.merge import merge as merge
from ._vectors.model import rename as rename
from ._vectors.model import select as select
from ._vectors.rounding import rounding_loss as rounding_loss
from ._vectors.vector import TaskVector as TaskVector

__version__ = "0.1.0"

__all__ = [
    "BackdoorVector",
    "TaskVector",
    "attacks",
    "calibration",
    "defenses",
    "errors",
    "load",
    "merge",
    "merges",
    "metrics",
    "peak_memory",
    "per_task",
    "presets",
    "rebase",
    "rename",
    "rounding_loss",
    "rules",
    "save",
    "save_adapter",
    "schedules",
    "select",
    "signs",
    "sparsify",
]


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
