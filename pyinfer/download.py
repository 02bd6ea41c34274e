"""Download one file by HTTP: resumed where it broke off, checked before it counts.

Source: RFC 9110 (range requests); Hugging Face says the SHA-256 of large files in X-Linked-Etag.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pyinfer.cache_file import disk_errors, need_space, publish, sha256_of
from pyinfer.errors import CapacityError, FormatError, ModelNotFoundError

_TIMEOUT_SECONDS = 30.0
_PAUSE_SECONDS = 1.0
_MAX_FAILURES = 3
_BLOCK_BYTES = 1 << 18
_SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Remote:
    """A file to fetch: address, its SHA-256 where known, a token for the address's host, how it may begin."""

    url: str
    sha256: str | None = None
    token: str | None = None
    magics: tuple[bytes, ...] = ()


class _Interrupted(Exception):
    """The connection broke or the server is busy: worth another attempt."""


def download(remote: Remote, target: Path, progress: Progress | None = None) -> None:
    """Fetch a file to `target`; what an interrupted attempt got is used by the next call.

    progress : called with (bytes that are here, bytes of the file or 0 where the server does not say)
    raises ModelNotFoundError, CapacityError, FormatError (wrong checksum; the download is removed)
    """
    transfer = _Transfer(remote, target, progress)
    failures = 0
    while True:
        before = transfer.done_bytes()
        try:
            transfer.attempt()
            break
        except _Interrupted as reason:
            failures = 1 if transfer.done_bytes() > before else failures + 1
            if failures >= _MAX_FAILURES:
                raise ModelNotFoundError(
                    f"{remote.url}: the download broke off ({reason}); check the network and start again, "
                    f"{transfer.done_bytes()} bytes are kept"
                ) from None
            time.sleep(_PAUSE_SECONDS * failures)
        except CapacityError:
            transfer.discard()
            raise
    transfer.finish()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the checksum in a redirect, and shows the token to no other host."""

    def __init__(self) -> None:
        self.checksum: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        self.checksum = _checksum(headers) or self.checksum
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request is not None and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            request.add_unredirected_header("Authorization", token)
        return request


class _Transfer:
    def __init__(self, remote: Remote, target: Path, progress: Progress | None):
        self.remote = remote
        self.target = target
        self.progress = progress
        self.part = target.with_name(target.name + ".part")
        # The version of the file that the part belongs to: only that one may be continued.
        self.tag = target.with_name(target.name + ".part.etag")
        self.checksum = remote.sha256

    def done_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)

    def attempt(self) -> None:
        """One request. Raises _Interrupted when another one may get further."""
        redirects = _Redirects()
        request, done = self._request()
        try:
            response = urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, done)
            self.checksum = self.remote.sha256 or redirects.checksum
            return
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(getattr(error, "reason", None) or error) from None
        with response:
            self.checksum = self.remote.sha256 or redirects.checksum or _checksum(response.headers)
            if response.status != 206 or _range_start(response.headers) != done:
                done = 0
            if done == 0 and response.status == 206:
                self.discard()
                raise _Interrupted("the server sent another part than it was asked for")
            length = response.headers.get("Content-Length", "")
            total = done + int(length) if length.isdigit() else 0
            need_space(self.target, max(total - done, 0))
            with disk_errors(self.target):
                if done == 0:
                    self.discard()
                    self.tag.write_text(response.headers.get("ETag", ""), "utf-8")
            with self._open_part() as file:
                done = self._receive(response, file, done, total)
        if total and done != total:
            raise _Interrupted(f"the connection ended after {done} of {total} bytes")

    def _open_part(self) -> BinaryIO:
        with disk_errors(self.target):
            return open(self.part, "ab")

    def _request(self) -> tuple[urllib.request.Request, int]:
        request = urllib.request.Request(self.remote.url, headers={"User-Agent": "pyinfer"})
        if self.remote.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.remote.token}")
        done = self.done_bytes()
        tag = self.tag.read_text("utf-8") if self.tag.exists() else ""
        if done == 0 or not tag or tag.startswith("W/"):
            return request, 0
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", tag)
        return request, done

    def _refused(self, error: urllib.error.HTTPError, done: int) -> None:
        """Raise what a refusal means; it means nothing when the part was whole already."""
        url = self.remote.url
        if error.code == 416 and done and error.headers.get("Content-Range") == f"bytes */{done}":
            return
        if error.code == 416:
            self.discard()
            raise _Interrupted("the server has less than was fetched before")
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f"HTTP status {error.code}")
        if error.code in (401, 403):
            raise ModelNotFoundError(
                f"{url}: the server asks for permission (HTTP status {error.code}); "
                "accept the model's terms on its page and set HF_TOKEN"
            )
        raise ModelNotFoundError(f"{url}: the server has no such file (HTTP status {error.code})")

    def _receive(self, response: http.client.HTTPResponse, file: BinaryIO, done: int, total: int) -> int:
        while True:
            if self.progress is not None:
                self.progress(done, total)
            try:
                block = response.read(_BLOCK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(error) from None
            if not block:
                return done
            with disk_errors(self.target):
                file.write(block)
                file.flush()
            done += len(block)

    def finish(self) -> None:
        """Check what was fetched and put it in place."""
        if self.checksum is not None:
            found = sha256_of(self.part)
            if found != self.checksum:
                self.discard()
                raise FormatError(
                    f"{self.remote.url}: sha256 is {found}, expected {self.checksum}; fetch it again"
                )
        with open(self.part, "rb") as file:
            magic = file.read(4)
        if self.remote.magics and magic not in self.remote.magics:
            self.discard()
            expected = " or ".join(map(repr, self.remote.magics))
            raise FormatError(
                f"{self.remote.url}: what the server sent begins with {magic!r}, expected {expected}"
            )
        publish(self.part, self.target)
        with contextlib.suppress(OSError):
            os.unlink(self.tag)


def _checksum(headers: http.client.HTTPMessage) -> str | None:
    tag = headers.get("X-Linked-Etag", "").strip().strip('"').lower()
    return tag if _SHA256.fullmatch(tag) else None


def _range_start(headers: http.client.HTTPMessage) -> int:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else -1
