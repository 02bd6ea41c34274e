"""A repository of Hugging Face on this machine: the files that a conversion needs, fetched once.

The huggingface_hub package knows the server's listing, the user's login and what its own cache has already.
The bytes are fetched by pyinfer.download, because huggingface_hub (2.4) begins a file again after every
interruption. A revision is one folder named after its commit, as in huggingface_hub's cache; it is complete
when its name stands in `refs`.

Source: the Hugging Face Hub API (api/models/<name>/revision/<revision>, <name>/resolve/<commit>/<file>).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pyinfer import config
from pyinfer.cache_file import disk_errors, exclusive, need_space
from pyinfer.download import Progress, Remote, download
from pyinfer.errors import FormatError, MissingExtraError, ModelNotFoundError, PyInferError
from pyinfer.gguf_metadata import quoted
from pyinfer.model_store import models_dir
from pyinfer_convert.weight_files import find_weights

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPOSITORY = re.compile(rf"(?P<name>{_WORD}/{_WORD})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"

# Everything but the weights; the rest of a repository (images, other formats) stays where it is.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
)


@dataclass(frozen=True)
class _File:
    name: str
    nbytes: int


@dataclass(frozen=True)
class _Listing:
    repository: str
    commit: str
    files: list[_File]


def is_repository_name(name: str) -> bool:
    """Whether a text looks like organisation/name or organisation/name@revision."""
    match = _REPOSITORY.fullmatch(name)
    # A path that begins with an existing folder is a mistyped path, not a repository.
    return match is not None and ".." not in name and not Path(name.partition("/")[0]).is_dir()


def fetch_repository(name: str, progress: Progress | None = None, *, offline: bool = False) -> Path:
    """The folder with the files of a repository that a conversion needs; what is there is not fetched again.

    progress : called with (done_bytes, total_bytes) over all files
    raises ModelNotFoundError, CapacityError, FormatError (a wrong checksum), MissingExtraError
    """
    match = _REPOSITORY.fullmatch(name)
    if match is None:
        raise ModelNotFoundError(f"{name[:200]}: no repository's name, expected organisation/name")
    repository, revision = match["name"], match["revision"] or _MAIN
    base = models_dir() / ("models--" + repository.replace("/", "--"))
    ref = base / "refs" / quote(revision, safe="")
    if offline or config.offline():
        commit = ref.read_text("utf-8").strip() if ref.is_file() else ""
        if _COMMIT.fullmatch(commit):
            return base / "snapshots" / commit
        snapshot = _snapshot(repository, revision, [])
        if snapshot is None:
            raise ModelNotFoundError(
                f"{name}: not in the cache folder {models_dir()}, and the network may not be used; "
                "run once without offline mode, or name a folder"
            )
        return snapshot
    token = _token()
    listing = _list(repository, revision, token)
    snapshot = _snapshot(repository, listing.commit, needed_files(listing.files))
    if snapshot is not None:
        return snapshot
    folder = base / "snapshots" / listing.commit
    with exclusive(folder):
        _fetch(listing, folder, token, progress)
        with disk_errors(ref):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.commit, "utf-8")
    return folder


def _fetch(listing: _Listing, folder: Path, token: str | None, progress: Progress | None) -> None:
    """Fetch what is not there yet: small files first, so that a repository that is no model costs little."""
    wanted = [file for file in needed_files(listing.files) if not (folder / file.name).is_file()]
    if not wanted:
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.nbytes for file in wanted)
    parts = [folder / (file.name + ".part") for file in wanted]
    need_space(folder, total - sum(part.stat().st_size for part in parts if part.is_file()))
    before = 0
    for file in wanted:
        url = f"{config.hf_endpoint()}/{listing.repository}/resolve/{listing.commit}/{quote(file.name)}"
        download(Remote(url, None, token), folder / file.name, _shifted(progress, before, total))
        before += file.nbytes
        if progress is not None:
            progress(before, total)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def needed_files(files: list[_File]) -> list[_File]:
    """Those of a repository's files that a conversion reads, small ones first."""
    by_name = {file.name: file for file in files}
    weights = find_weights(by_name)
    names = [name for name in SMALL_FILES if name in by_name]
    if weights.index is not None:
        names.append(weights.index)
    return [by_name[name] for name in (*names, *weights.files) if name in by_name]


def _token() -> str | None:
    """HF_TOKEN, or the token of `hf auth login`."""
    return config.hf_token() or _hub().get_token()


def _hub():  # type: ignore[no-untyped-def]
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError(
            "models of Hugging Face are fetched with the package huggingface_hub; "
            "run pip install 'pyinfer[hub]', or give the folder of a checkpoint"
        ) from None
    return huggingface_hub


def _list(repository: str, revision: str, token: str | None) -> _Listing:
    """What the server has; every name and number in its answer is checked."""
    endpoint = config.hf_endpoint()
    api = _hub().HfApi(endpoint=endpoint, token=token or False)
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=30.0)
    except Exception as error:  # its classes changed with every major version
        raise _explain(repository, revision, error) from None
    if not _COMMIT.fullmatch(info.sha or ""):
        raise FormatError(
            f"{endpoint}: the commit of {repository} is {quoted(str(info.sha))}, expected 40 digits"
        )
    files = [_File(each.rfilename, each.size or 0) for each in info.siblings or []]
    return _Listing(repository, info.sha, [file for file in files if "/" not in file.name])


def _explain(repository: str, revision: str, error: Exception) -> PyInferError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    if kind == "RevisionNotFoundError":
        return ModelNotFoundError(
            f"{repository}: has no revision {quoted(revision)}; name a branch, tag or commit"
        )
    if status == 404:
        return ModelNotFoundError(
            f"{repository}: {config.hf_endpoint()} has no such repository; check its name"
        )
    if status in (401, 403):
        return ModelNotFoundError(
            f"{repository}: no such repository at {config.hf_endpoint()}, or one that asks for permission "
            f"(HTTP status {status}); check the name, accept the model's terms on its page and set HF_TOKEN"
        )
    reason = f"HTTP status {status}" if status else f"{kind}: {str(error)[:120]}"
    return ModelNotFoundError(
        f"{repository}: {config.hf_endpoint()} does not answer ({reason}); check the network and start again"
    )


def _snapshot(repository: str, revision: str, files: list[_File]) -> Path | None:
    """A folder of huggingface_hub's own cache that has these files, where other programs fetched them."""
    found = _hub().try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    whole = all((folder / file.name).is_file() for file in files)
    return folder if whole else None
