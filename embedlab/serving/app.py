"""A gallery over HTTP: the routes, and the page that uses them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, FastAPI, Header, Query, Request, Response, Security
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

import embedlab
from embedlab._types import Neighbours, Vectors
from embedlab.data.images import ImageError, fit_image, image_pixels
from embedlab.retrieval import Calibration, Gallery, GalleryError
from embedlab.retrieval.inputs import LONGEST_LABEL, checked_key, checked_labels
from embedlab.retrieval.store import AnotherRequest
from embedlab.serving.batching import Batcher
from embedlab.serving.gate import LOOPBACK, Gate, Refusal, busy
from embedlab.serving.inbox import Inbox

Result = TypeVar("Result")
Pixels = np.ndarray[Any, Any]

MAX_BODY = 10_000_000  # bytes
AT_ONCE = 64  # images being decoded, embedded or written; the next one gets 503
MOST_PIXELS = 50_000_000  # of one image, 150 MB in memory
MOST_PICTURED = 100_000  # templates; beyond, the list of identities comes without pictures
ALIKE = 0.5  # cosine from which strangers are grouped where the gallery's threshold is none
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")  # fewer than from files: each decoder is a door
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PUBLIC = (*PAGE, "/api/health")

Label = Annotated[str, Field(min_length=1, max_length=LONGEST_LABEL)]
Id = Annotated[int, Field(ge=1, lt=2**53)]
RequestKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="Name of this request. Repeating it under the same key changes nothing and gives the same answer.",
    ),
]


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class Health(BaseModel):
    """That the server answers."""

    status: str


class Near(BaseModel):
    """A template near a probe."""

    id: int
    label: str
    score: float
    thumbnail: str | None = Field(description="Where its picture is; null where the gallery keeps none.")


class Identified(BaseModel):
    """Who a probe is; label null is unknown, and before calibration no decision."""

    label: str | None
    score: float | None = Field(description="Of the best identity, three decimals; null in an empty gallery.")
    threshold: float | None
    calibrated: bool
    stale: bool = Field(
        description="The gallery has outgrown its calibration: strangers get in more often than promised."
    )
    verified: bool = Field(description="False while the digests of a large gallery are still being checked.")
    neighbours: list[Near]


class Verified(BaseModel):
    """Whether a claim holds; null before calibration."""

    label: str
    accepted: bool | None
    score: float
    threshold: float | None
    stale: bool


class Enrolled(BaseModel):
    """The new template."""

    id: int
    label: str


class Identity(BaseModel):
    """An enrolled identity."""

    label: str
    templates: int
    thumbnail: str | None


class Identities(BaseModel):
    """A part of the list, in alphabetical order."""

    identities: list[Identity]
    total: int
    next: str | None = Field(description="What to pass as `after` for the next part; null at the end.")


class Point(BaseModel):
    """One threshold of the operating curve."""

    threshold: float
    fpir: float = Field(description="Share of strangers who are taken for somebody.")
    bound: float | None = Field(description="Its upper confidence bound.")
    detection: float | None = Field(description="Share of enrolled people who are named right.")


class About(BaseModel):
    """What the gallery holds and promises."""

    identities: int
    templates: int
    calibrated: bool
    threshold: float | None
    verification_threshold: float | None
    fpir: float | None = Field(description="Promised false-positive identification rate.")
    confidence: float | None
    stale: bool = Field(description="The gallery has outgrown its calibration.")
    curve: list[Point]
    read_only: bool
    inbox_days: float | None
    max_body: int


class Removal(BaseModel):
    """What to remove: an identity, or single templates."""

    model_config = ConfigDict(extra="forbid")
    label: Label | None = None
    ids: Annotated[list[Id], Field(min_length=1, max_length=1000)] | None = None


class Removed(BaseModel):
    """Templates removed."""

    removed: int


class Renaming(BaseModel):
    """An identity and its new name."""

    model_config = ConfigDict(extra="forbid")
    label: Label
    new_label: Label


class Renamed(BaseModel):
    """Templates that carry the new name."""

    renamed: int


class Stranger(BaseModel):
    """Unknown probes that look alike."""

    ids: list[int]
    pictures: list[str]
    seen: float = Field(description="When the newest came, seconds since 1970.")


class Strangers(BaseModel):
    """The inbox."""

    clusters: list[Stranger]
    days: float


class Naming(BaseModel):
    """Probes of the inbox and the identity that they are enrolled as."""

    model_config = ConfigDict(extra="forbid")
    ids: Annotated[list[Id], Field(min_length=1, max_length=1000)]
    label: Label


class Dismissal(BaseModel):
    """Probes of the inbox to erase."""

    model_config = ConfigDict(extra="forbid")
    ids: Annotated[list[Id], Field(min_length=1, max_length=1000)]


class Done(BaseModel):
    """Probes that left the inbox."""

    probes: int


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers that any route may give, for the schema."""
    return {status: {"model": Problem} for status in (400, 401, 403, 408, 413, 422, 500, 503, *statuses)}


IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "label": {"type": "string", "description": "Instead of the query's, which proxies log."},
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def create_app(
    gallery: Gallery,
    *,
    key: str | None = None,
    hosts: Iterable[str] = LOOPBACK,
    addresses: bool = False,
    max_body: int = MAX_BODY,
    read_only: bool = False,
    inbox_days: float | None = None,
    verify_per_minute: int = 30,
) -> FastAPI:
    """Build the ASGI application; it does not close the gallery.

    Args:
        gallery: Open for writing, unless `read_only`, with an embedder.
        key: What clients must send as `Authorization: Bearer KEY`; None asks for none.
        hosts: Names by which clients may call this server.
        addresses: Also by any IP address.
        max_body: Largest request in bytes.
        read_only: Refuse what changes the gallery.
        inbox_days: Keep unknown probes for so many days; None keeps none.
        verify_per_minute: Attempts to verify one label.

    Raises:
        ValueError: A gallery of ready-made vectors, or an inbox with `read_only`.
    """
    service = Service(gallery, read_only=read_only, inbox_days=inbox_days, verify_per_minute=verify_per_minute)
    app = FastAPI(
        title="embedlab gallery",
        version=embedlab.__version__,
        description="Enroll, identify, verify and remove. Embeddings never leave the server.",
        lifespan=service.lifespan,
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
    )
    app.include_router(_health())
    app.include_router(_routes(service, max_body), dependencies=[] if key is None else LOCKED)
    _add_page(app)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(GalleryError, _gallery_error)
    app.add_middleware(Gate, key=key, hosts=hosts, addresses=addresses, max_body=max_body, public=PUBLIC)
    return app


class Service:
    """What the routes do, between the event loop and the gallery's threads.

    Arguments as in `create_app`.
    """

    def __init__(self, gallery: Gallery, *, read_only: bool, inbox_days: float | None, verify_per_minute: int) -> None:
        if read_only and inbox_days is not None:
            raise ValueError(
                "An inbox is written to, so that --inbox and --read-only do not go together; give --inbox to the "
                "server that writes."
            )
        self.gallery = gallery
        self.read_only = read_only
        self._pictures = bool(gallery.info()["thumbnails"])
        self._normalises = gallery.info()["settings"].get("normalisation") is not None
        self._embedder: Any = gallery.embedder  # loads it, so that the first request need not wait
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="embedlab-decode")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="embedlab-write")
        self._batcher = Batcher(lambda images: gallery.embed(images).vectors)
        self._images = 0  # being worked on
        self._attempts = Attempts(verify_per_minute)
        self._pictured: tuple[int, dict[str, int]] = (-1, {})
        self.inbox = None if inbox_days is None else Inbox(gallery.folder, inbox_days)
        if self.inbox is not None:
            self.inbox.follow(gallery)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Warm the model, run, stop the threads."""
        self._batcher.start()
        if size := getattr(self._embedder, "image_size", None):
            await self._batcher.vector(np.zeros((self._channels, size, size), np.uint8))
        purging = asyncio.create_task(self._purge())
        yield
        purging.cancel()
        with suppress(asyncio.CancelledError):
            await purging
        await self._batcher.stop()
        for pool in (self._decoding, self._writing):
            await asyncio.to_thread(pool.shutdown)
        if self.inbox:
            self.inbox.close()

    async def _purge(self) -> None:
        while self.inbox:
            await asyncio.to_thread(self.inbox.purge)
            await asyncio.sleep(600)

    @property
    def _channels(self) -> int:
        return int(getattr(self._embedder, "channels", 3))

    # ---- images ----------------------------------------------------------------------------------------------------

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for one more image, or 503."""
        if self._images >= AT_ONCE:
            raise busy(f"{AT_ONCE} images are being worked on")
        self._images += 1
        try:
            yield
        finally:
            self._images -= 1

    async def decoded(self, content: bytes) -> tuple[Pixels, Pixels]:
        """Bytes of a file to the whole image and to the one that the model sees, both (C, H, W)."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, self._decode, content)

    def _decode(self, content: bytes) -> tuple[Pixels, Pixels]:
        if not content:
            raise Refusal(422, "No image came: send a file as the body, or as the field image of a form.")
        try:
            image = Image.open(BytesIO(content), formats=FORMATS)
            if image.width * image.height > MOST_PIXELS:
                raise Refusal(
                    422,
                    f"The image has {image.width} x {image.height} pixels; {MOST_PIXELS / 1e6:.0f} million at most.",
                )
            pixels = image_pixels(image, channels=self._channels)
        except Refusal:
            raise
        except ImageError as error:
            raise Refusal(422, f"The image cannot be read: {error.reason}.") from None
        except Exception:  # a decoder may throw anything at a damaged file
            raise Refusal(422, f"This is no whole image of a known kind ({', '.join(FORMATS)}).") from None
        whole = pixels.transpose(2, 0, 1)
        if preprocess := getattr(self._embedder, "preprocess", None):
            return whole, np.asarray(preprocess(whole[None]))[0]
        if size := getattr(self._embedder, "image_size", None):
            whole = fit_image(pixels, size).transpose(2, 0, 1)
        return whole, whole

    async def vector(self, image: Pixels) -> Vectors:
        """Embed one image, together with those of other requests."""
        return await self._batcher.vector(image)

    # ---- answers ---------------------------------------------------------------------------------------------------

    async def identify(self, content: bytes, k: int) -> Identified:
        """Name a probe, or say unknown."""
        with self.place():
            _, image = await self.decoded(content)
            vector = await self.vector(image)
            found = (await asyncio.to_thread(self.gallery.identify, embeddings=vector, k=k))[0]
            if self.inbox and found.calibrated and found.label is None:
                await asyncio.to_thread(self.inbox.keep, image, vector)
        return Identified(
            label=found.label,
            score=_rounded(found.score),
            threshold=_rounded(found.threshold),
            calibrated=found.calibrated,
            stale=found.stale,
            verified=found.verified,
            neighbours=self._near(found.neighbours),
        )

    def _near(self, found: Neighbours) -> list[Near]:
        rows = zip(found.ids[0].tolist(), found.labels[0], found.scores[0].tolist(), strict=True)
        return [
            Near(id=number, label=label, score=round(score, 3), thumbnail=self._address(number))
            for number, label, score in rows
            if label is not None
        ]

    def _address(self, number: int) -> str | None:
        return f"/api/templates/{number}/thumbnail" if self._pictures else None

    def thumbnail(self, number: int) -> bytes | None:
        """JPEG of a template, where the gallery keeps one."""
        try:
            return self.gallery.thumbnail(number)
        except ValueError:  # no such template
            return None

    async def verify(self, label: str, content: bytes) -> Verified:
        """Check a claim."""
        if not await asyncio.to_thread(self.gallery.__contains__, label):
            raise Refusal(404, "Nobody is enrolled under this label.")
        self._attempts.count(label)
        with self.place():
            _, image = await self.decoded(content)
            vector = await self.vector(image)
            try:
                found = await asyncio.to_thread(self.gallery.verify, label, embedding=vector)
            except ValueError:  # removed meanwhile
                raise Refusal(404, "Nobody is enrolled under this label.") from None
        return Verified(
            label=label,
            accepted=found.accepted,
            score=round(found.score, 3),
            threshold=_rounded(found.threshold),
            stale=found.stale,
        )

    def about(self, max_body: int) -> About:
        """What the page shows beside the answers."""
        info, found = self.gallery.info(), self.gallery.calibration
        return About(
            identities=info["identities"],
            templates=info["templates"],
            calibrated=found is not None,
            threshold=None if found is None else _rounded(found.threshold),
            verification_threshold=None if found is None else _rounded(found.verification_threshold),
            fpir=None if found is None else found.fpir,
            confidence=None if found is None else found.confidence,
            stale=found is not None and found.is_stale(info["identities"]),
            curve=_curve(found),
            read_only=self.read_only,
            inbox_days=self.inbox.days if self.inbox else None,
            max_body=max_body,
        )

    def identities(self, after: str, limit: int) -> Identities:
        """A part of the list, each with the picture of its first template."""
        counts = self.gallery.counts()
        labels = [label for label in counts if label > after] if after else list(counts)
        part, first = labels[:limit], self._first_templates()
        return Identities(
            identities=[
                Identity(
                    label=label,
                    templates=counts[label],
                    thumbnail=self._address(first[label]) if label in first else None,
                )
                for label in part
            ],
            total=len(counts),
            next=part[-1] if len(labels) > limit else None,
        )

    def _first_templates(self) -> dict[str, int]:
        if not self._pictures or len(self.gallery) > MOST_PICTURED:
            return {}
        generation = self.gallery.generation
        if self._pictured[0] != generation:
            stored = self.gallery.embeddings()
            assert stored.labels is not None
            backwards = zip(reversed(stored.labels), reversed(stored.ids.tolist()), strict=True)
            self._pictured = (generation, dict(backwards))
        return self._pictured[1]

    # ---- changes ---------------------------------------------------------------------------------------------------

    async def enroll(self, label: str, content: bytes, key: str | None) -> Enrolled:
        """Add a template; durable when this returns, and repeated under one key it adds one."""
        self._require_writable()
        _require_label(label)
        _require_key(key)
        with self.place():
            whole, _ = await self.decoded(content)
            ids = await self._change(
                lambda: self.gallery.enroll(images=whole[None], labels=[label], key=key), refused=422
            )
        return Enrolled(id=int(ids[0]), label=label)

    async def remove(self, wanted: Removal, key: str | None) -> Removed:
        """Remove an identity or templates, and erase them from the files where that can be promised."""
        self._require_writable()
        _require_key(key)
        if (wanted.label is None) == (wanted.ids is None):
            raise Refusal(422, "Name either a label or ids.")

        removed = await self._change(
            lambda: self.gallery.remove(labels=wanted.label, ids=wanted.ids, purge=self.gallery.purges, key=key),
            refused=404,
        )
        return Removed(removed=removed)

    async def rename(self, wanted: Renaming, key: str | None) -> Renamed:
        """Give an identity another name."""
        self._require_writable()
        _require_label(wanted.new_label)
        _require_key(key)
        absent = not await asyncio.to_thread(self.gallery.__contains__, wanted.label)
        renamed = await self._change(
            lambda: self.gallery.rename(wanted.label, wanted.new_label, key=key), refused=404 if absent else 409
        )
        return Renamed(renamed=renamed)

    async def _change(self, work: Callable[[], Result], *, refused: int) -> Result:
        """Change the gallery, which refuses what does not fit it with this status."""
        try:
            return await self._write(work)
        except AnotherRequest as error:
            raise Refusal(409, str(error)) from None
        except ValueError as error:
            raise Refusal(refused, str(error)) from None

    async def _write(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writing, work)

    def _require_writable(self) -> None:
        if self.read_only:
            raise Refusal(403, "The server runs with --read-only and changes nothing.")

    # ---- inbox -----------------------------------------------------------------------------------------------------

    def _require_inbox(self) -> Inbox:
        if self.inbox is None:
            raise Refusal(404, "The server keeps no strangers; start it with --inbox DAYS to do so.")
        return self.inbox

    async def strangers(self) -> Strangers:
        """The inbox in groups."""
        inbox, found = self._require_inbox(), self.gallery.calibration
        threshold = ALIKE if found is None or self._normalises else found.threshold
        clusters = await asyncio.to_thread(inbox.clusters, threshold)
        listed = [
            Stranger(
                ids=list(cluster.ids),
                pictures=[f"/api/inbox/{number}/picture" for number in cluster.ids[:8]],
                seen=round(cluster.seen),
            )
            for cluster in clusters
        ]
        return Strangers(clusters=listed, days=inbox.days)

    async def stranger(self, number: int) -> bytes:
        """Picture of a probe in the inbox."""
        content = await asyncio.to_thread(self._require_inbox().picture, number)
        if content is None:
            raise Refusal(404, "No such picture, or its time is over.")
        return content

    async def name_strangers(self, wanted: Naming) -> Done:
        """Enroll probes of the inbox."""
        inbox = self._require_inbox()
        self._require_writable()
        _require_label(wanted.label)
        await self._change(lambda: inbox.name(self.gallery, wanted.ids, wanted.label), refused=409)
        return Done(probes=len(wanted.ids))

    async def dismiss_strangers(self, wanted: Dismissal) -> Done:
        """Erase probes of the inbox."""
        await asyncio.to_thread(self._require_inbox().dismiss, wanted.ids)
        return Done(probes=len(wanted.ids))


class Attempts:
    """At most so many per minute and label: who may try for ever gets in.

    Args:
        per_minute: Attempts; as many may come at once.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}  # attempts left, at which time

    def count(self, label: str) -> None:
        """Take one attempt, or refuse with 429."""
        now = time.monotonic()
        left, then = self._left.get(label, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            raise Refusal(429, f"Too many attempts on this label; the next in {wait} s.", retry_after=str(wait))
        self._left[label] = (left - 1, now)


# ---- routes --------------------------------------------------------------------------------------------------------


def _health() -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.get("/health", responses=_problems())
    async def health() -> Health:
        """Answer when the server is ready; needs no key."""
        return Health(status="ok")

    return router


def _routes(service: Service, max_body: int) -> APIRouter:
    router = APIRouter(prefix="/api")
    _add_asking(router, service, max_body)
    _add_changing(router, service)
    _add_inbox(router, service)
    return router


LOCKED = [Security(HTTPBearer(auto_error=False, description="The key of --key-file."))]  # for the schema: the gate asks


def _add_asking(router: APIRouter, service: Service, max_body: int) -> None:
    @router.get("/gallery", responses=_problems())
    async def about() -> About:
        """What the gallery holds and promises, with its operating curve."""
        return await asyncio.to_thread(service.about, max_body)

    @router.get("/identities", responses=_problems())
    async def identities(
        after: Annotated[str, Query(max_length=LONGEST_LABEL)] = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Identities:
        """List the enrolled identities."""
        return await asyncio.to_thread(service.identities, after, limit)

    @router.get(
        "/templates/{id}/thumbnail",
        responses={**_problems(404), 200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
    )
    async def thumbnail(id: Annotated[int, InPath(ge=1, lt=2**53)]) -> Response:
        """Picture of a template, where the gallery keeps one."""
        content = await asyncio.to_thread(service.thumbnail, id)
        if content is None:
            raise Refusal(404, "The gallery keeps no picture of this template.")
        return Response(content, media_type="image/jpeg")

    @router.post("/identify", responses=_problems(), openapi_extra=IMAGE_BODY)
    async def identify(request: Request, k: Annotated[int, Query(ge=1, le=50)] = 5) -> Identified:
        """Name a probe, or say unknown; `k` neighbours come with the answer."""
        content, _ = await _image(request)
        return await service.identify(content, k)

    @router.post("/verify", responses=_problems(404, 429), openapi_extra=IMAGE_BODY)
    async def verify(
        request: Request, label: Annotated[str | None, Query(min_length=1, max_length=LONGEST_LABEL)] = None
    ) -> Verified:
        """Check that a probe is who it claims to be; so many attempts per minute and label."""
        content, named = await _image(request)
        return await service.verify(_one_label(label, named), content)


def _add_changing(router: APIRouter, service: Service) -> None:
    @router.post("/enroll", status_code=201, responses=_problems(409), openapi_extra=IMAGE_BODY)
    async def enroll(
        request: Request,
        label: Annotated[str | None, Query(min_length=1, max_length=LONGEST_LABEL)] = None,
        key: RequestKey = None,
    ) -> Enrolled:
        """Add a template of an identity; 201 means that it is on the disk."""
        content, named = await _image(request)
        return await service.enroll(_one_label(label, named), content, key)

    @router.post("/remove", responses=_problems(404, 409))
    async def remove(wanted: Removal, key: RequestKey = None) -> Removed:
        """Remove an identity with all its templates, or single templates, and erase them from the files."""
        return await service.remove(wanted, key)

    @router.post("/rename", responses=_problems(404, 409))
    async def rename(wanted: Renaming, key: RequestKey = None) -> Renamed:
        """Give an identity another name that is not in use."""
        return await service.rename(wanted, key)


def _add_inbox(router: APIRouter, service: Service) -> None:
    @router.get("/inbox", responses=_problems(404))
    async def strangers() -> Strangers:
        """Unknown probes in groups that look alike, the largest first."""
        return await service.strangers()

    @router.get(
        "/inbox/{id}/picture",
        responses={**_problems(404), 200: {"content": {"image/png": {}}}},
        response_class=Response,
    )
    async def picture(id: Annotated[int, InPath(ge=1, lt=2**53)]) -> Response:
        """An unknown probe as the embedder saw it."""
        return Response(await service.stranger(id), media_type="image/png")

    @router.post("/inbox/name", responses=_problems(404, 409))
    async def name(wanted: Naming) -> Done:
        """Enroll unknown probes; they leave the inbox. Repeating it adds nothing."""
        return await service.name_strangers(wanted)

    @router.post("/inbox/dismiss", responses=_problems(404))
    async def dismiss(wanted: Dismissal) -> Done:
        """Erase unknown probes."""
        return await service.dismiss_strangers(wanted)


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in PAGE.items():
        content = (Path(__file__).parent / "page" / name).read_bytes()

        async def file(_request: Request, content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_route(path, file, methods=["GET"], include_in_schema=False)


# ---- requests and refusals -----------------------------------------------------------------------------------------


class _Form(MultiPartParser):
    spool_max_size = 2**40  # in memory, which the gate has bounded already: no picture goes to a temporary file


async def _image(request: Request) -> tuple[bytes, str | None]:
    """The picture of a request, as body or as a form's field, and the label of the form."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await request.body(), None
    try:
        form = await _Form(request.headers, request.stream(), max_files=1, max_fields=8).parse()
    except (MultiPartException, LookupError, ValueError) as error:
        raise Refusal(400, f"The form cannot be read: {error}. Send the field image as a file.") from None
    try:
        image, label = form.get("image"), form.get("label")
        if not isinstance(image, UploadFile):
            raise Refusal(422, "The form has no file in the field image.")
        return await image.read(), label if isinstance(label, str) else None
    finally:
        await form.close()


def _one_label(query: str | None, form: str | None) -> str:
    label = query or form
    if not label or (query and form and query != form):
        raise Refusal(422, "Name one label: in the field label of the form, or as ?label=... with a raw body.")
    return label


def _require_label(label: str) -> None:
    try:
        checked_labels([label], 1)
        label.encode()
    except ValueError:
        raise Refusal(422, f"A label has 1 to {LONGEST_LABEL} printable characters.") from None


def _require_key(key: str | None) -> None:
    try:
        if key is not None:
            checked_key(key)
            key.encode()
    except ValueError:
        raise Refusal(422, "An Idempotency-Key has 1 to 200 printable characters.") from None


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse({"detail": error.detail}, error.status, error.headers)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """Where and why, without what came: that may be a picture."""
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()[:5]]
    return JSONResponse({"detail": "; ".join(found)}, 422)


async def _gallery_error(request: Request, error: Exception) -> JSONResponse:
    """A full disk or a damaged file: the message names paths, and is for the log only."""
    from embedlab.serving.gate import logger

    logger.error("The gallery failed at %s: %s", request.url.path, error)
    return JSONResponse(
        {"detail": "The gallery cannot do this now; the server's log says why."}, 503, {"retry-after": "10"}
    )


def _rounded(score: float | None) -> float | None:
    """Three decimals: enough to look at, too few to climb towards a face step by step."""
    return None if score is None or math.isnan(score) else round(score, 3)


def _curve(calibration: Calibration | None) -> list[Point]:
    return [
        Point(threshold=round(threshold, 3), fpir=fpir, bound=bound, detection=detection)
        for threshold, fpir, bound, detection in (calibration.curve if calibration else ())
    ]
