"""Downloads of Hugging Face files from a small server that breaks off, redirects and lies."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pyinfer import download
from pyinfer.errors import CapacityError, FormatError, ModelNotFoundError
from pyinfer.model_store import MODELS, HubFile, NamedModel, find_model, models_dir

CONTENT = b"GGUF" + bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "org/repo/file.gguf"
URL_PATH = "/org/repo/resolve/main/file.gguf"


@dataclass
class Hub:
    """What the server does next, and what it was asked for."""

    address: str = ""
    content: bytes = CONTENT
    etag: str = '"one"'
    linked_etag: str = ""
    token: str = ""
    ranges: bool = True
    redirect: str = ""
    cuts: list[int] = field(
        default_factory=list
    )  # how many bytes the next answers send before they break off
    statuses: list[int] = field(default_factory=list)  # refusals of the next requests
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, dict(self.headers)))
        if hub.statuses:
            return self.answer(hub.statuses.pop(0), b"")
        if hub.redirect and not self.path.startswith("/moved"):
            return self.answer(
                302, b"", {"Location": hub.redirect + "/moved", "X-Linked-Etag": hub.linked_etag}
            )
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"")
        start = self.range_start()
        if start >= len(hub.content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(hub.content)}"})
        headers = {"ETag": hub.etag, "X-Linked-Etag": hub.linked_etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(hub.content) - 1}/{len(hub.content)}"
        return self.answer(206 if start else 200, hub.content[start:], headers)

    def range_start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None or not self.hub.ranges or self.headers.get("If-Range") != self.hub.etag:
            return 0
        return int(match[1])

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.hub.cuts.pop(0) if body and self.hub.cuts else len(body)
        self.hub.sent.append(min(cut, len(body)))
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def other_hub() -> Iterator[Hub]:
    yield from serve()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for hub in serve():
        monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", hub.address + "/")
        for name in ("HF_TOKEN", "PYINFER_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
        yield hub


def cached() -> dict[str, bytes]:
    paths = [path for path in models_dir().rglob("*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if not path.name.endswith(".lock")}


def register(monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> None:
    monkeypatch.setitem(MODELS, "tiny", NamedModel("tiny", HubFile("org/repo", "file.gguf", sha256), "test"))


def test_a_file_of_a_repository_is_fetched_once(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []
    path = find_model(NAME, progress=lambda done, total: seen.append((done, total)))
    assert path == models_dir() / "org" / "repo" / "file.gguf" and path.read_bytes() == CONTENT
    assert seen == sorted(seen) and seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert find_model(NAME) == path
    assert [path for path, _ in hub.requests] == [URL_PATH] and cached() == {"file.gguf": CONTENT}


def test_a_file_name_is_quoted_in_the_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", NamedModel("tiny", HubFile("org/repo", "a b/c#1.gguf"), "test"))
    assert find_model("tiny").parts[-2:] == ("a b", "c#1.gguf")
    assert hub.requests[0][0] == "/org/repo/resolve/main/a%20b/c%231.gguf"


def test_a_broken_connection_is_continued(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, SHA256)
    hub.cuts = [700_000, 100_000]
    seen: list[int] = []
    assert find_model("tiny", progress=lambda done, total: seen.append(done)).read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert [headers.get("Range") for _, headers in hub.requests] == [None, "bytes=700000-", "bytes=800000-"]
    assert sum(hub.sent) == len(CONTENT) and cached() == {"file.gguf": CONTENT}


def test_a_later_call_continues_what_an_earlier_one_began(hub: Hub) -> None:
    hub.cuts = [500_000, 0, 0, 0]
    with pytest.raises(
        ModelNotFoundError, match=r"file\.gguf: the download broke off .* 500000 bytes are kept"
    ):
        find_model(NAME)
    assert cached() == {"file.gguf.part": CONTENT[:500_000], "file.gguf.part.etag": b'"one"'}
    hub.cuts = []
    assert find_model(NAME).read_bytes() == CONTENT
    assert hub.requests[-1][1]["Range"] == "bytes=500000-" and cached() == {"file.gguf": CONTENT}


def test_a_download_interrupted_by_its_user_is_continued(hub: Hub) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_model(NAME, progress=interrupt)
    begun = cached()["file.gguf.part"]
    assert 300_000 < len(begun) < len(CONTENT)
    assert find_model(NAME).read_bytes() == CONTENT
    assert hub.requests[-1][1]["Range"] == f"bytes={len(begun)}-"


def test_a_file_that_changed_meanwhile_starts_again(hub: Hub) -> None:
    hub.cuts = [500_000, 0, 0, 0]
    with pytest.raises(ModelNotFoundError):
        find_model(NAME)
    hub.cuts, hub.etag, hub.content = [], '"two"', b"GGUF" + b"new" * 100_000
    assert find_model(NAME).read_bytes() == hub.content


def test_a_part_that_was_whole_already_needs_no_more_bytes(hub: Hub) -> None:
    folder = models_dir() / "org" / "repo"
    folder.mkdir(parents=True)
    (folder / "file.gguf.part").write_bytes(CONTENT)
    (folder / "file.gguf.part.etag").write_text('"one"')
    assert find_model(NAME).read_bytes() == CONTENT
    assert sum(hub.sent) == 0 and cached() == {"file.gguf": CONTENT}


def test_a_part_longer_than_the_file_starts_again(hub: Hub) -> None:
    folder = models_dir() / "org" / "repo"
    folder.mkdir(parents=True)
    (folder / "file.gguf.part").write_bytes(CONTENT + b"x")
    (folder / "file.gguf.part.etag").write_text('"one"')
    assert find_model(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(("ranges", "etag"), [(False, '"one"'), (True, ""), (True, 'W/"one"')])
def test_a_server_that_cannot_continue_starts_again(hub: Hub, ranges: bool, etag: str) -> None:
    hub.ranges, hub.etag, hub.cuts = ranges, etag, [500_000]
    assert find_model(NAME).read_bytes() == CONTENT
    assert hub.sent == [500_000, len(CONTENT)]


def test_a_wrong_checksum_is_refused_and_removed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "0" * 64)
    with pytest.raises(FormatError, match=rf"file\.gguf: sha256 is {SHA256}, expected 0{{64}}"):
        find_model("tiny")
    assert cached() == {}
    hub.linked_etag = f'"{"1" * 64}"'
    with pytest.raises(FormatError, match=r"expected 1{64}"):
        find_model(NAME)
    assert cached() == {}


def test_the_checksum_of_a_redirect_counts(hub: Hub, other_hub: Hub) -> None:
    hub.redirect, hub.linked_etag = other_hub.address, f'"{"2" * 64}"'
    with pytest.raises(FormatError, match=r"expected 2{64}"):
        find_model(NAME)
    hub.linked_etag = f'"{SHA256}"'
    assert find_model(NAME).read_bytes() == CONTENT


def test_what_is_no_gguf_file_is_refused(hub: Hub) -> None:
    hub.content = b"<html>sign in</html>"
    with pytest.raises(FormatError, match=r"what the server sent begins with b'<htm', expected b'GGUF'"):
        find_model(NAME)
    assert cached() == {}


def test_the_token_goes_to_its_own_host_only(
    hub: Hub, other_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(ModelNotFoundError, match=r"asks for permission \(HTTP status 401\).*HF_TOKEN"):
        find_model(NAME)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.redirect = hub.address
    assert find_model(NAME).read_bytes() == CONTENT
    assert hub.requests[-1][0] == "/moved" and hub.requests[-1][1]["Authorization"] == "Bearer secret"
    hub.redirect = other_hub.address
    assert find_model("org/repo/other.gguf").read_bytes() == CONTENT
    assert other_hub.requests and "Authorization" not in other_hub.requests[0][1]


def test_refusals_are_one_sentence(hub: Hub) -> None:
    hub.statuses = [404]
    with pytest.raises(
        ModelNotFoundError, match=r"file\.gguf: the server has no such file \(HTTP status 404\)"
    ):
        find_model(NAME)
    hub.statuses = [503, 429]
    assert find_model(NAME).read_bytes() == CONTENT
    hub.statuses = [503] * 9
    with pytest.raises(ModelNotFoundError, match=r"broke off \(HTTP status 503\)"):
        find_model("org/repo/other.gguf")


def test_an_unreachable_server_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFoundError, match=r"the download broke off .*check the network"):
        find_model(NAME)
    assert cached() == {}


def test_a_full_disk_leaves_nothing_behind(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cuts = [400_000, 0, 0, 0]
    with pytest.raises(ModelNotFoundError):
        find_model(NAME)
    hub.cuts = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(
        CapacityError, match=rf"needs {len(CONTENT) - 400_000} bytes of disk space, 1000 are free"
    ):
        find_model(NAME)
    assert cached() == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_disk_that_fills_up_leaves_nothing_behind(hub: Hub) -> None:
    folder = models_dir() / "org" / "repo"
    folder.mkdir(parents=True)
    part = folder / "file.gguf.part"
    part.symlink_to("/dev/full")
    hub.etag = ""
    original = download._Transfer.discard
    kept = []

    def discard_later(transfer: download._Transfer) -> None:
        # The first removal would take the device away before it is written to.
        if kept:
            original(transfer)
        kept.append(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download._Transfer, "discard", discard_later)
        with pytest.raises(CapacityError, match=r"no space left for file\.gguf"):
            find_model(NAME)
    assert not os.path.lexists(part) and cached() == {}


def test_all_parts_of_a_split_model_are_fetched(hub: Hub) -> None:
    path = find_model("org/repo/q4/m-00002-of-00003.gguf")
    assert path == models_dir() / "org" / "repo" / "q4" / "m-00002-of-00003.gguf"
    assert sorted(cached()) == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert find_model("org/repo/q4/m-00001-of-00003.gguf", offline=True).exists() and len(hub.requests) == 3


def test_threads_at_once_fetch_once(hub: Hub) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_model(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(hub.requests) == 1
