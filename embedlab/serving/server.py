"""`embedlab serve`: one process that holds the gallery and answers HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import stat
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from embedlab.retrieval import Gallery
from embedlab.retrieval.gallery import is_address
from embedlab.serving.app import MAX_BODY, create_app
from embedlab.serving.gate import LOOPBACK

SECONDS_FOR_HEADERS = 15.0
SECONDS_TO_FINISH = 10  # when the server is told to stop
SHORTEST_KEY = 16  # characters

logger = logging.getLogger("embedlab")


def serve(
    folder: str | Path,
    embedder: Any = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key_file: Path | None = None,
    allow_hosts: list[str] | None = None,
    max_body: int = MAX_BODY,
    read_only: bool = False,
    inbox_days: float | None = None,
) -> None:
    """Open a gallery and answer until a signal comes.

    Args:
        folder: Of the gallery, or its address on Milvus.
        embedder: As in `Gallery.open`; None takes the encoder that the gallery keeps.
        host: Address to listen on; another than loopback needs a key.
        port: 0 takes a free one.
        key_file: Holds the key that clients must send; readable by its owner only.
        allow_hosts: Further names by which clients call this server.
        max_body: Largest request in bytes.
        read_only: Take no lock and change nothing.
        inbox_days: Keep unknown probes for so many days.

    Raises:
        ValueError: No key for a host that others can reach, a key file that others can read, a port that is taken.
        GalleryLocked: Another process writes to the gallery.
    """
    local = _is_loopback(host)
    if not local and key_file is None:
        raise ValueError(
            f"Others can reach {host}, so that serving there needs a key: make one with "
            "'umask 077; openssl rand -hex 32 > gallery.key' and pass --key-file gallery.key, or stay on 127.0.0.1."
        )
    if is_address(folder) and inbox_days is not None:
        raise ValueError(
            f"The inbox keeps pictures in a file beside the gallery, and {folder} lies on Milvus: leave --inbox out, "
            "or serve a gallery in a folder."
        )
    key = None if key_file is None else _key(key_file)
    os.umask(0o077)
    listening = _listen(host, port)
    signal.signal(signal.SIGTERM, _stop)
    with listening, Gallery.open(folder, embedder, read_only=read_only) as gallery:
        if not (read_only or is_address(folder)):
            _make_private(gallery.folder)
        app = create_app(
            gallery,
            key=key,
            hosts=[*LOOPBACK, host, *(allow_hosts or [])],
            addresses=not local,
            max_body=max_body,
            read_only=read_only,
            inbox_days=inbox_days,
        )
        config = uvicorn.Config(
            app,
            http=Impatient,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it logs a line for every stranger that knocks
        name = f"[{host}]" if ":" in host else host
        sys.stderr.write(f"{gallery!r}\nhttp://{name}:{listening.getsockname()[1]}\n")
        sys.stderr.flush()
        uvicorn.Server(config).run(sockets=[listening])


class Impatient(H11Protocol):
    """Hangs up on who opens a connection and does not send a whole request head in time."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop waiting when the head is whole, start when the next begins."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self._waiting:
            self._waiting.cancel()

    def _watch(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._waiting is None:
            self._waiting = self.loop.call_later(SECONDS_FOR_HEADERS, self.transport.close)
        elif not idle and self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def _stop(_number: int, _frame: FrameType | None) -> None:
    """Leave through the context managers, which close the gallery."""
    raise SystemExit(143)


def _make_private(folder: Path) -> None:
    """Whatever the umask was when the gallery was made: nobody else reads it."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a key ({error}). Make one with 'umask 077; openssl rand -hex 32 > {path}'."
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"Others can read the key file {path} (mode {mode & 0o777:04o}); run 'chmod 600 {path}'.")
    if len(key) < SHORTEST_KEY or not key.isprintable() or " " in key:
        raise ValueError(
            f"The key in {path} must be one word of at least {SHORTEST_KEY} characters, got {len(key)}; make one with "
            f"'umask 077; openssl rand -hex 32 > {path}'."
        )
    return key


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(512)
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Cannot listen on {host} port {port}: {error}. Does another server run there? --port 0 takes a free one."
        ) from error
    return listening
