"""Files at a URL: listed, identified and opened through fsspec, and http(s) by Python's own client.

    s3:// gs:// az:// hf:// memory:// ...    one file, a folder, or a pattern (`s3://bucket/data/*.jsonl.gz`)
    http:// https://                         one file

Files are read as a stream, nothing is copied to the disk; a Parquet file over http, which is read in no order, goes to
a temporary file first.
"""

import io
import mmap
import re
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any, cast

from preceptor.errors import DataError, first_line

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.")
_HTTP = ("http", "https")
_SECONDS = 30  # to wait for a server's answer, and for more of a file
_ALIVE_SECONDS = 60  # of silence, after which a server that sends without end is asked whether it is there


def protocol_of(path: str) -> str | None:
    """`s3` of s3://bucket/file; None for what is no URL."""
    match = _URL.match(path)
    return match[1] if match else None


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, with what of a `Path` the formats ask."""

    url: str

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("://")[2].partition("?")[0] if self._is_http else self.url)

    @property
    def _is_http(self) -> bool:
        return protocol_of(self.url) in _HTTP

    @property
    def suffix(self) -> str:
        return self._path.suffix

    def with_suffix(self, suffix: str) -> PurePosixPath:
        return self._path.with_suffix(suffix)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Raises OSError."""
        if self._is_http:
            return cast(IO[bytes], io.BufferedReader(_HttpStream(self.url), 1 << 20))
        return cast(IO[bytes], _asked(self.url, lambda: _system(self.url).open(self.url, mode)))

    @cached_property
    def _copy(self) -> mmap.mmap | bytes:
        with tempfile.TemporaryFile() as copy, self.open() as content:
            shutil.copyfileobj(content, copy, 1 << 20)
            copy.flush()
            return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) if copy.tell() else b""

    def open_seekable(self) -> IO[bytes]:
        """Over http a copy, which is kept until `forget`. Raises OSError."""
        if not self._is_http:
            return self.open()
        import pyarrow as pa

        return cast(IO[bytes], pa.BufferReader(self._copy))

    def forget(self) -> None:
        """Keep no copy; one that is open can be read on."""
        vars(self).pop("_copy", None)

    def identity(self) -> list[str] | None:
        """The URL, and what the server says changes with the content; None where it says nothing. Raises DataError."""
        try:
            if not self._is_http:
                return ["remote", self.url, str(_asked(self.url, lambda: _system(self.url).ukey(self.url)))]
            with _requested(self.url, "HEAD") as response:
                about = [response.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")]
        except urllib.error.HTTPError:  # a server that answers no HEAD
            return None
        except OSError as error:
            raise DataError(f"{self.url}: cannot be read: {first_line(error)}") from None
        return ["http", self.url, *map(str, about)] if any(about[:2]) else None


def find_remote(path: str) -> list[RemoteFile]:
    """The files that a URL names, in the order of their names: itself, those of a folder or of a pattern.

    Raises DataError if there are none, if the server cannot be asked, or if a package is missing for it.
    """
    if protocol_of(path) in _HTTP:
        return [RemoteFile(path)]
    system = _system(path)

    def names() -> list[str]:
        if re.search(r"[*?\[]", path):
            return sorted(name for name in system.glob(path) if system.isfile(name))
        return [path] if system.isfile(path) else sorted(system.find(path))

    try:
        found = _asked(path, names)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    if not found:
        raise DataError(f"{path}: no such file, folder or pattern there")
    return [RemoteFile(name if protocol_of(name) else str(system.unstrip_protocol(name))) for name in found]


def as_found(path: str) -> str:
    """A folder's URL as those of its files begin: fsspec writes the first name of a protocol that has several."""
    system = _system(path)
    return str(system.unstrip_protocol(system._strip_protocol(path)))


def _system(url: str) -> Any:
    """The file system of a URL. Raises DataError where none is known, or its package is missing."""
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        needed = known_implementations.get(protocol, {}).get("class", "").partition(".")[0] or error.name
        raise DataError(f"{url}: {protocol}:// needs the package {needed}: pip install {needed}") from None
    except ValueError:
        raise DataError(f"{url}: {protocol}:// is no protocol that is known (s3, gs, az, hf, http, https)") from None
    except Exception as error:  # settings and credentials that its library does not take
        raise DataError(f"{url}: cannot be read: {first_line(error)}") from None


def _asked(url: str, ask: Callable[[], Any]) -> Any:
    """The answer of a file system or server. Whatever its library raises becomes an OSError."""
    try:
        return ask()
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error


def _requested(url: str, method: str = "GET") -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "preceptor"})
    return _asked(url, lambda: urllib.request.urlopen(request, timeout=_SECONDS))


def _wait_while_connected(connection: socket.socket) -> None:
    """However long the server is silent; that the connection is gone is told by the system."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _ALIVE_SECONDS)


class _HttpStream(io.RawIOBase):
    """The content of a URL, in order. Raises OSError where the server ends before the end."""

    def __init__(self, url: str) -> None:
        self._url, self._response = url, _requested(url)
        length = self._response.headers.get("Content-Length")
        self._left = None if length is None else int(length)
        if self._left is None and self._response.fp is not None:
            _wait_while_connected(self._response.fp.raw._sock)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # What is there: a server may send slowly, without an end.
        content: bytes = _asked(self._url, lambda: self._response.read1(len(buffer)))
        buffer[: len(content)] = content
        if self._left is not None:
            self._left -= len(content)
            if not content and self._left and len(buffer):
                raise OSError(f"the server sent {self._left:,} bytes less than it said")
        return len(content)

    def close(self) -> None:
        self._response.close()
        super().close()
