"""Task-vector primitives: arithmetic, sparsification and merging of model weights, and backdoor vectors on top.

from taskvec import TaskVector, merge, load, save
from taskvec.merges import ties

base, *tuned = map(load, ["base.safetensors", "mnist.safetensors", "svhn.safetensors"])
vectors = [TaskVector.between(base, t) for t in tuned]
merge(vectors, ties, density=0.2).apply(base)
"""

from . import attacks as attacks
from . import defenses as defenses
from . import evaluate as evaluate
from . import intervals as intervals
from . import merges as merges
from . import presets as presets
from . import rules as rules
from . import signs as signs
from . import similarity as similarity
from . import sparsify as sparsify
from . import sphere as sphere
from ._errors import TaskvecError as TaskvecError
from .backdoor import BackdoorVector as BackdoorVector
from .checkpoint import load as load
from .merging import merge as merge
from .vector import TaskVector as TaskVector
from .vector import rounding_loss as rounding_loss
from .writer import save as save

__version__ = "0.1.0"
