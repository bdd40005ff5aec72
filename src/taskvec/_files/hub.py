"""Models on the Hugging Face Hub as sources: headers are fetched when one is opened, weights when they are read.

The client does the rest: where names point, tokens, the cache, and working offline from it.
"""

import re
from collections.abc import Generator, Hashable, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import override

from .._engine.lazy import Lazy
from .._engine.names import listed
from .._engine.sources import Spec
from .._vectors.vector import TaskVector
from ..errors import FormatError, LocationError, TaskvecError
from .adapters import CONFIG, WEIGHTS, load_adapter
from .format import DTYPES, INDEX, ORIGIN, PICKLE, PICKLE_INDEX
from .pickles import SUFFIXES, open_pickle, open_pickles
from .safetensors import File, check_whole, described, shard_names, weight_map

__all__ = ["companions", "is_hub_name", "open_hub"]

NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
ONE_FILE = "model.safetensors"


class Repository(NamedTuple):
    """A model on the Hub at one commit.

    Attributes:
        name: `org/name`.
        commit: its full hash.
        folder: within it, with a slash at the end, or nothing.
    """

    name: str
    commit: str
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"


class Remote(File):
    """The tensors of files on the Hub; a file is downloaded when one of its tensors is first read.

    Args:
        repository: where they are.
        files: name -> the file it is in.
        specs: name -> shape and dtype, as the headers have it.
    """

    def __init__(self, repository: Repository, files: Mapping[str, str], specs: Mapping[str, Spec]) -> None:
        super().__init__(files, specs, {})  # a file's stamp is taken when the first of its tensors is read
        self.repository = repository

    @override
    def path(self, name: str) -> str:
        path = _downloaded(self.repository, self.files[name])
        if described(path).specs.get(name) != self.specs[name]:
            raise FormatError(f"{name!r} in {self.files[name]!r} of {self.repository} is not what its header said")
        return path

    @override
    def key(self) -> Hashable:
        return self.repository, tuple(self.files.items())

    @override
    def __getstate__(self) -> dict[str, Any]:  # equal models pickle to equal data, whatever was read of them
        return super().__getstate__() | {"stamps": {}}


def is_hub_name(text: str) -> bool:
    """Whether a text can be a name on the Hub: `org/name[@revision]`, `hf://...`, or a web address; no file's name."""
    if text.startswith(("hf://", "https://", "http://")):
        return True
    return NAME.fullmatch(text) is not None and not text.endswith((".safetensors", *SUFFIXES))


def open_hub(text: str, base: Mapping[str, Tensor] | None) -> Lazy | TaskVector:
    """A model on the Hub, lazy, or an adapter.

    Args:
        text: `org/name[@revision]`, `hf://org/name[@revision][/path]`, or the web address of a model or of a file.
        base: of an adapter, the model it was trained on.

    Raises:
        LocationError: no such model, revision or file, or no way to the Hub and nothing in the cache.
        FormatError: it holds no weights, or damaged ones.
    """
    with _explained(text):
        repository, file = _parsed(text)
        found = _file(repository, file) if file.endswith((".safetensors", *SUFFIXES)) else None
        found = found or _folder(repository._replace(folder=f"{file}/" if file else ""), base)
        if isinstance(found, TaskVector):
            return TaskVector(found, meta={**found.meta, ORIGIN: str(repository)})
        found.metadata = {**found.metadata, ORIGIN: str(repository)}
        return found


def _file(repository: Repository, file: str) -> Lazy:
    return open_pickle(Path(_downloaded(repository, file))) if file.endswith(SUFFIXES) else _opened(repository, [file])


def _folder(repository: Repository, base: Mapping[str, Tensor] | None) -> Lazy | TaskVector:
    """What a repository, or a folder in it, holds."""
    if config := _found(repository, CONFIG):
        _downloaded(repository, WEIGHTS)
        return load_adapter(Path(config).parent, base)
    if index := _found(repository, INDEX):
        return _opened(repository, shard_names(Path(index)), Path(index))
    for file in (ONE_FILE, PICKLE):
        if _has(repository, file):
            return _file(repository, file)
    if index := _found(repository, PICKLE_INDEX):
        for shard in shard_names(Path(index)):
            _downloaded(repository, shard)
        return open_pickles(Path(index))
    raise FormatError(
        f"{repository} holds none of {INDEX}, {ONE_FILE}, {CONFIG}, {PICKLE} and {PICKLE_INDEX}; name the file that is "
        f"meant: hf://{repository}/{repository.folder}weights.safetensors"
    )


def companions(repository: Repository, patterns: tuple[str, ...]) -> dict[str, Path]:
    """The files of a repository whose names match, downloaded: name -> path."""
    with _explained(str(repository)):
        names = [name.removeprefix(repository.folder) for name in _files(repository)]
        wanted = [name for name in names if "/" not in name and any(fnmatch(name, p) for p in patterns)]
        return {name: Path(_downloaded(repository, name)) for name in wanted}


def _client() -> Any:
    """The Hub's client: imported only where it is needed, for that takes time; its own types are unknown in part."""
    return import_module("huggingface_hub")


def _parsed(text: str) -> tuple[Repository, str]:
    """The repository that a text names, its revision resolved to a commit, and the path within it."""
    hub = _client()
    uri = hub.parse_hf_uri(text if "://" in text else f"hf://{text}", endpoint=hub.constants.ENDPOINT)
    if uri.type != "model":
        raise LocationError(f"{text!r} is a {uri.type} on the Hub, not a model")
    resolved = hub.resolve_revision(uri.id, revision=uri.revision).resolved
    return Repository(uri.id, resolved), uri.path_in_repo.rstrip("/")


def _opened(repository: Repository, files: list[str], index: Path | None = None) -> Lazy:
    """Some files as one lazy mapping; only their headers are fetched."""
    specs: dict[str, Spec] = {}
    owner: dict[str, str] = {}
    said: dict[str, str] = {}
    for file in files:
        found, metadata = _header(repository, file)
        if twice := [name for name in found if name in owner]:
            raise FormatError(f"{listed(twice)} is in {file!r} and in {owner[twice[0]]!r} of {repository}")
        specs |= found
        owner |= dict.fromkeys(found, file)
        said |= metadata
    if index is not None and owner != weight_map(index):
        raise FormatError(f"the shards of {repository} do not hold what {INDEX} says")
    return Lazy(Remote(repository, owner, specs), metadata=said)


def _header(repository: Repository, file: str) -> tuple[dict[str, Spec], dict[str, str]]:
    """Names, shapes and dtypes of one file, from the cache or by a request for its first bytes."""
    hub = _client()
    name = repository.folder + file
    cached = hub.try_to_load_from_cache(repository.name, name, revision=repository.commit)
    if isinstance(cached, str):
        local = described(cached)
        return local.specs, local.metadata
    header = hub.parse_safetensors_file_metadata(repository.name, name, revision=repository.commit)
    wrong = {str(t.dtype) for t in header.tensors.values() if str(t.dtype) not in DTYPES}
    if wrong:
        raise FormatError(f"{file!r} of {repository} has the dtype {listed(sorted(wrong))}, which is not supported")
    specs = {key: Spec(tuple(t.shape), DTYPES[str(t.dtype)]) for key, t in header.tensors.items()}
    metadata = dict[str, str](header.metadata or {})
    check_whole(f"{name} of {repository}", metadata)
    return specs, metadata


@lru_cache(maxsize=1024)
def _downloaded(repository: Repository, file: str) -> str:
    return _client().hf_hub_download(repository.name, repository.folder + file, revision=repository.commit)


def _found(repository: Repository, file: str) -> str | None:
    """The path of a small file, downloaded, or None where the repository has none of the name."""
    return _downloaded(repository, file) if _has(repository, file) else None


def _has(repository: Repository, file: str) -> bool:
    return repository.folder + file in _files(repository)


@lru_cache(maxsize=64)
def _files(repository: Repository) -> list[str]:
    """The names of all files: from the Hub, or of those in the cache where it cannot be reached."""
    hub = _client()
    try:
        return list[str](hub.HfApi().list_repo_files(repository.name, revision=repository.commit))
    except Exception:
        files: Any = import_module("huggingface_hub.file_download")
        name: str = files.repo_folder_name(repo_id=repository.name, repo_type="model")
        folder = Path(hub.constants.HF_HUB_CACHE) / name / "snapshots" / repository.commit
        if not folder.is_dir():
            raise
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


@contextmanager
def _explained(text: str) -> Generator[None]:
    """Errors of the client as ours, with what can be done."""
    errors: Any = import_module("huggingface_hub.errors")
    try:
        yield
    except TaskvecError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise LocationError(
            f"{text!r} is neither a file nor a folder here, nor a model on the Hub that can be read; if it is private "
            "or gated, log in first (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LocationError(f"{text!r}: the Hub has no such revision") from error
    except errors.HfUriError as error:
        raise LocationError(f"{text!r} is neither a file nor a folder here, nor a name on the Hub: {error}") from error
    except errors.EntryNotFoundError as error:
        raise LocationError(f"{text!r}: no such file, or it is not in the cache: {error}") from error
    except errors.SafetensorsParsingError as error:
        raise FormatError(f"{text!r} holds no intact safetensors: {error}") from error
    except Exception as error:
        raise LocationError(
            f"{text!r} is neither a file nor a folder here, and as a name on the Hub it could not be read: "
            f"{type(error).__name__}: {error}"
        ) from error
