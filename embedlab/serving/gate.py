"""What every request passes before the application sees it: name of the host, key, origin, size of the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger("embedlab")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECONDS_FOR_A_BODY = 20.0
BODIES_AT_ONCE = 8  # times the limit of one: what all unfinished requests together may hold in memory
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",  # pictures and names are to be gone when they are removed
}


class Refusal(Exception):
    """An answer that is no success.

    Args:
        status: HTTP status.
        detail: What came, what was expected, the way out; goes to the client.
        headers: Further headers, such as Retry-After.
    """

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def busy(what: str) -> Refusal:
    """503 with the time after which to try again."""
    return Refusal(503, f"{what}; try again in a second.", retry_after="1")


class Gate:
    """ASGI middleware around the whole application.

    A request is refused before one byte of its body is read: 400 for a host that is not ours (DNS rebinding), 401
    without the key, 403 when another site's page sent it, 413 for a declared length over the limit. The body is then
    read into memory, at most `max_body` bytes and within `SECONDS_FOR_A_BODY`, before the application starts: a slow
    client holds no thread, and nothing is written to temporary files.

    Args:
        app: What is behind it.
        key: What `Authorization: Bearer` must carry; None lets everyone in.
        hosts: Names in the Host header that are ours, lower case, without port.
        addresses: Also take any IP address as host; rebinding needs a name.
        max_body: Bytes.
        public: Paths that need no key.
    """

    def __init__(
        self,
        app: Application,
        *,
        key: str | None,
        hosts: Iterable[str],
        addresses: bool,
        max_body: int,
        public: Collection[str],
    ) -> None:
        self.app = app
        self.key = None if key is None else _hashed(key.encode())
        self.hosts = {host.lower() for host in hosts}
        self.addresses = addresses
        self.max_body = max_body
        self.public = public
        self._held = 0  # bytes of all bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"Only HTTP is spoken here, got {scope['type']}.")
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in there)]
            await send(message)

        try:
            await self._admit(scope, receive, answer)
        except Refusal as refusal:
            # what is left of the body is not read: the connection cannot be used again
            await refuse(answer, refusal, connection="close")
        except Exception:
            logger.exception("An error while answering %s %s", scope["method"], _shown(scope["path"]))
            if not status:
                await refuse(answer, Refusal(500, "An error in the server; its log has the details."))
        milliseconds = 1e3 * (time.perf_counter() - started)
        logger.info("%s %s %d %.0f ms", scope["method"], _shown(scope["path"]), status, milliseconds)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        self._require_host(headers.get(b"host", b"").decode("latin-1"))
        reading = scope["method"] in ("GET", "HEAD")
        if not (reading and scope["path"] in self.public):
            self._require_key(headers.get(b"authorization", b""))
        if not reading:
            _require_origin(headers)
        self._require_size(headers.get(b"content-length"))
        body, ended = bytearray(), False
        try:
            if not reading:
                await self._read(receive, body)

            async def whole() -> Message:
                nonlocal ended
                if ended:
                    return await receive()  # waits for the client to hang up
                ended = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            await self.app(scope, whole, send)
        finally:
            self._held -= len(body)

    def _require_host(self, given: str) -> None:
        try:
            host = urlsplit(f"//{given}").hostname or ""
            urlsplit(f"//{given}").port  # noqa: B018 (raises for a port that is none)
        except ValueError:
            host = ""
        if host in self.hosts or (self.addresses and _is_address(host)):
            return
        raise Refusal(400, "The Host header names another server. Start this one with --allow-host NAME to serve it.")

    def _require_key(self, given: bytes) -> None:
        if self.key is None:
            return
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_hashed(token.strip()), self.key):
            raise Refusal(
                401,
                "This needs the server's key: 'Authorization: Bearer KEY'.",
                www_authenticate='Bearer realm="embedlab"',
            )

    def _require_size(self, declared: bytes | None) -> None:
        if declared is not None and (not declared.isdigit() or int(declared[:20]) > self.max_body):
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body is larger than {self.max_body} bytes; send a smaller image.")

    async def _read(self, receive: Receive, body: bytearray) -> None:
        try:
            async with asyncio.timeout(SECONDS_FOR_A_BODY):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "The connection ended before the body did.")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    if len(body) + len(part) > self.max_body:
                        raise self._too_large()
                    if self._held + len(part) > BODIES_AT_ONCE * self.max_body:
                        raise busy("Too many uploads at once")
                    body += part
                    self._held += len(part)
        except TimeoutError:
            raise Refusal(408, f"The body did not arrive within {SECONDS_FOR_A_BODY:.0f} seconds.") from None


async def refuse(send: Send, refusal: Refusal, **headers: str) -> None:
    """Send a refusal as JSON."""
    body = json.dumps({"detail": refusal.detail}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers, **refusal.headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """By lower-case name; Host, Authorization, Origin and Content-Length must not come twice."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in found and name in (b"host", b"authorization", b"origin", b"content-length"):
            raise Refusal(400, f"The header {name.decode('latin-1')} came twice.")
        found[name] = value
    return found


def _require_origin(headers: dict[bytes, bytes]) -> None:
    """Refuse what a browser sends on behalf of another site's page; programs send no Origin."""
    origin = headers.get(b"origin")
    foreign = origin is not None and origin.partition(b"://")[2].lower() != headers.get(b"host", b"").lower()
    if foreign or headers.get(b"sec-fetch-site", b"same-origin") in (b"cross-site", b"same-site"):
        raise Refusal(403, "Another site's page sent this request; only the page of this server may.")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _hashed(key: bytes) -> bytes:
    return hashlib.blake2b(key).digest()


def _shown(path: str) -> str:
    """A path for the log: no line breaks, no tricks with a terminal, not long."""
    return "".join(letter if letter.isprintable() else "?" for letter in path[:200])
