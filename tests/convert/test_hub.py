"""Repositories of Hugging Face from a small local server that speaks the needed part of its API."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import safetensors, torch_file

from pyinfer import download
from pyinfer.errors import FormatError, MissingExtraError, ModelNotFoundError, UnsupportedError
from pyinfer.model_store import models_dir
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_convert.hub import fetch_repository, is_repository_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
ONE = {"a": np.arange(100_000, dtype=np.float32)}
TWO = {"b": np.arange(50, dtype=np.float16)}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}


def as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


FILES = {
    name: as_bytes(content)
    for name, content in {
        ".gitattributes": b"x",
        "README.md": b"# model",
        "config.json": {"architectures": ["LlamaForCausalLM"]},
        "tokenizer.json": {"model": {}},
        "model.safetensors.index.json": INDEX,
        SHARDS[0]: safetensors(ONE),
        SHARDS[1]: safetensors(TWO),
        "pytorch_model.bin": torch_file(ONE),
        "onnx/model.safetensors": b"another",
        "../escape.json": b"{}",
    }.items()
}


@dataclass
class Hub:
    """What the server has and does, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    commit: str = COMMIT
    token: str = ""
    checksum: str = ""  # said of every file in place of the right one
    cuts: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its next answer breaks off
    status: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    def asked(self, part: str = "/resolve/") -> list[str]:
        return [path.partition(f"{part}{self.commit}/")[2] for path, _ in self.requests if part in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, dict(self.headers)))
        if hub.status:
            return self.answer(hub.status, b"{}")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"{}")
        listing = re.match(r"/api/models/org/model/revision/(main|v1|[0-9a-f]{40})\b", self.path)
        if listing:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            body = {"_id": "1", "id": "org/model", "sha": hub.commit, "siblings": siblings}
            return self.answer(200, json.dumps(body).encode())
        name = self.path.partition(f"/org/model/resolve/{hub.commit}/")[2]
        if name not in hub.files:
            code = "RevisionNotFound" if self.path.startswith("/api/models/org/model/") else "RepoNotFound"
            return self.answer(404, b"{}", {"X-Error-Code": code})
        data = hub.files[name]
        tag = f'"{hub.checksum or hashlib.sha256(data).hexdigest()}"'
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and self.headers.get("If-Range") == tag else 0
        headers = {"ETag": tag, "X-Linked-Etag": tag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, data[start:], headers, hub.cuts.pop(name, None))

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    for name in ("HF_TOKEN", "PYINFER_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_only_what_a_conversion_reads_is_fetched_once(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []
    with open_checkpoint("org/model", progress=lambda done, total: seen.append((done, total))) as checkpoint:
        assert np.array_equal(checkpoint.read("a"), ONE["a"]) and np.array_equal(
            checkpoint.read("b"), TWO["b"]
        )
        assert checkpoint.path.parent == models_dir() / "models--org--model" / "snapshots"
    wanted = ["config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS]
    assert hub.asked() == wanted
    total = sum(len(FILES[name]) for name in wanted)
    assert seen == sorted(seen) and seen[-1] == (total, total) and {each for _, each in seen} == {total}
    open_checkpoint("org/model").close()
    assert hub.asked() == wanted


def test_an_interrupted_download_is_continued(hub: Hub) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("org/model", progress=interrupt)
    begun = next(models_dir().rglob("*.part")).stat().st_size
    assert 0 < begun < len(FILES[SHARDS[0]])
    before = len(hub.requests)
    with open_checkpoint("org/model") as checkpoint:
        assert np.array_equal(checkpoint.read("a"), ONE["a"])
    later = {path.rpartition("/")[2]: headers for path, headers in hub.requests[before:]}
    assert later[SHARDS[0]]["Range"] == f"bytes={begun}-" and "config.json" not in later
    assert not list(models_dir().rglob("*.part*"))


def test_a_connection_that_breaks_is_continued_at_once(hub: Hub) -> None:
    hub.cuts = {SHARDS[0]: 150_000}
    with open_checkpoint("org/model") as checkpoint:
        assert np.array_equal(checkpoint.read("a"), ONE["a"])
    ranges = [headers.get("Range") for path, headers in hub.requests if path.endswith(SHARDS[0])]
    assert ranges == [None, "bytes=150000-"]


def test_a_new_commit_is_a_new_folder(hub: Hub) -> None:
    first = fetch_repository("org/model")
    hub.commit = OTHER
    second = fetch_repository("org/model")
    assert first.name == COMMIT and second.name == OTHER and (first / "config.json").is_file()
    assert fetch_repository("org/model", offline=True) == second
    assert hub.asked("/resolve/")[-1] == SHARDS[1]


def test_a_revision_can_be_named(hub: Hub) -> None:
    assert fetch_repository("org/model@v1").name == COMMIT
    with pytest.raises(
        ModelNotFoundError, match=r"org/model: has no revision nowhere; name a branch, tag or commit"
    ):
        fetch_repository("org/model@nowhere")


def test_offline_uses_what_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"org/model: not in the cache folder .*network may not be used"
    ):
        fetch_repository("org/model", offline=True)
    folder = fetch_repository("org/model")
    before = len(hub.requests)
    monkeypatch.setenv("PYINFER_OFFLINE", "1")
    assert fetch_repository("org/model") == folder and len(hub.requests) == before


def test_the_cache_of_huggingface_hub_is_used(hub: Hub, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS):
        (snapshot / name).write_bytes(FILES[name])
    assert fetch_repository("org/model") == snapshot and hub.asked() == []
    (snapshot / SHARDS[1]).unlink()
    assert fetch_repository("org/model") != snapshot and len(hub.asked()) == 5


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    with pytest.raises(ModelNotFoundError, match=r"asks for permission \(HTTP status 401\).*set HF_TOKEN"):
        fetch_repository("org/model")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch_repository("org/model").is_dir()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    hub.commit = OTHER
    assert fetch_repository("org/model").name == OTHER


@pytest.mark.parametrize(
    "status, message",
    [(404, "has no such repository"), (403, "asks for permission"), (400, "HTTP status 400")],
)
def test_refusals_are_one_sentence(hub: Hub, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(ModelNotFoundError, match=message) as error:
        fetch_repository("org/model")
    assert "\n" not in str(error.value) and hub.address in str(error.value)


def test_an_unreachable_server_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ModelNotFoundError, match=r"http://127\.0\.0\.1:9 does not answer .*check the network"
    ):
        fetch_repository("org/model")


def test_a_wrong_checksum_is_refused(hub: Hub) -> None:
    hub.checksum = "0" * 64
    with pytest.raises(FormatError, match=r"config\.json: sha256 is .*expected 0{64}"):
        fetch_repository("org/model")


def test_a_lying_commit_is_refused(hub: Hub) -> None:
    hub.commit = "../../../../etc"
    with pytest.raises(FormatError, match=r"the commit of org/model is \.\./\.\./"):
        fetch_repository("org/model")


def test_an_adapter_is_refused_without_its_weights(hub: Hub) -> None:
    hub.files = {
        "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
        "adapter_model.safetensors": FILES[SHARDS[0]],
    }
    with pytest.raises(UnsupportedError, match="LoRA adapter of org/base, not a model; merge it"):
        open_checkpoint("org/model")
    assert hub.asked() == ["adapter_config.json"]


def test_a_missing_package_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pyinfer\[hub\]'"):
        fetch_repository("org/model")


def test_names_of_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert all(map(is_repository_name, ("org/name", "a.b/c_d-e@v1.0", "o/n@refs/pr/1")))
    names = (
        "name",
        "a/b/c",
        "/org/name",
        "./org",
        "../x",
        "org/..",
        "models/absent",
        "org/na me",
        "org/name@",
        "",
    )
    assert not any(map(is_repository_name, names))
