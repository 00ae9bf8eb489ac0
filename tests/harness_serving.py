"""A server to torment: as a script it serves a gallery; imported, it has what the tests of serving share.

python tests/harness_serving.py FOLDER PORT [--key-file FILE] [--inbox DAYS]
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from embedlab import Gallery
from embedlab.retrieval import CallableEmbedder

SIZE = 32


def coarse(images):
    """(B, 3, S, S) to (B, 48): an embedder that needs no network."""
    images, side = np.asarray(images, np.float32), images.shape[2] // 4
    return images.reshape(len(images), 3, 4, side, 4, side).mean(axis=(3, 5)).reshape(len(images), -1) - 127.5


def embedder():
    return CallableEmbedder(coarse, image_size=SIZE, fingerprint="coarse pixels 1")


def pixels(person, shot=0, size=64):
    """(size, size, 3): a pattern that is the same for one person, with noise by the number of the shot."""
    pattern = np.random.default_rng(person).integers(0, 256, (4, 4, 3))
    noise = np.random.default_rng([person, shot]).normal(0, 12, (16, 16, 3))
    large = np.kron(pattern, np.ones((size // 4, size // 4, 1))) + np.kron(noise, np.ones((size // 16, size // 16, 1)))
    return np.clip(large, 0, 255).astype(np.uint8)


def png(person, shot=0, size=64):
    file = BytesIO()
    Image.fromarray(pixels(person, shot, size)).save(file, "PNG")
    return file.getvalue()


def batch(people, shots):
    """(N, 3, 64, 64) and N labels."""
    images = [pixels(person, shot) for person in people for shot in range(shots)]
    return np.stack(images).transpose(0, 3, 1, 2), [f"person {person}" for person in people for _ in range(shots)]


def make_gallery(folder, people=12, *, calibrated=True, names=None, **options):
    """A gallery of some people, calibrated on 100 strangers and a further image of each person."""
    with Gallery.create(folder, embedder(), **options) as gallery:
        images, labels = batch(range(people), 2)
        named = {label: label if names is None else names[int(label.split()[1])] for label in labels}
        gallery.enroll(images, labels=[named[label] for label in labels])
        if calibrated:
            images, labels = batch([*range(1000, 1100), *range(people)], 3)
            gallery.calibrate(images, labels=[named.get(label, label) for label in labels], fpir=0.05)
    return folder


class Server:
    """A server in a process of its own; a context manager."""

    def __init__(self, folder, *options):
        self.folder, self.options, self.port = str(folder), options, free_port()

    def start(self):
        command = [sys.executable, __file__, self.folder, str(self.port), *self.options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        self.log = open(f"{self.folder}.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.log.close()
                raise AssertionError(Path(f"{self.folder}.log").read_text())
            with contextlib.suppress(OSError):
                if self.raw(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
                    b"HTTP/1.1 200"
                ):
                    return self
            time.sleep(0.02)
        raise AssertionError("The server did not start within a minute.")

    def stop(self, kill=False):
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(timeout=30)
        self.log.close()
        return self.process.returncode

    __enter__ = start

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()

    def raw(self, content, timeout=10, read=1 << 20):
        """Send bytes, read until the server hangs up (or `read` bytes came)."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(content)
            answer = b""
            with contextlib.suppress(ConnectionResetError, TimeoutError):
                while len(answer) < read and (part := connection.recv(65536)):
                    answer += part
            return answer

    def post(self, path, body=b"", **headers):
        """(status, JSON) of one request on a connection of its own."""
        fields = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        answer = self.raw(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body, timeout=30)
        if not answer:
            raise ConnectionError("no answer")
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(content)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ---- requests from the schema --------------------------------------------------------------------------------------

TRAVERSAL = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "....//....//etc/passwd", "file:///etc/passwd",
             "http://169.254.169.254/latest", "C:\\windows\\win.ini", "%00", "..\\..\\gallery.db", "~/.ssh/key",
             "encoder/../../gallery.db", "\\\\host\\share", "${jndi:ldap://x/a}", "; cat /etc/passwd",
             "$(id)")  # fmt: skip
ODD_TEXT = ("", " ", "a", "Ada", "é", "日本語", "\u202eabc", "\x00", "\n", "😀", "'; DROP TABLE item; --",
            "<img src=x onerror=alert(1)>", "a" * 1000, "a" * 1001, "\ud7ff", "null", "person 1",
            *TRAVERSAL)  # fmt: skip
ODD_NUMBERS = (0, 1, -1, 2, 50, 51, 1000, 1001, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1.5, True, None, "1", [], {})


class Fuzzer:
    """Requests for every operation of an OpenAPI schema: valid ones, and ones that are wrong in one place or more."""

    def __init__(self, schema, seed=0):
        self.schema = schema
        self.random = random.Random(seed)
        self.operations = [
            (path, method, operation)
            for path, methods in schema["paths"].items()
            for method, operation in methods.items()
        ]

    def request(self):
        """Method, URL, headers, body and the operation."""
        path, method, operation = self.random.choice(self.operations)
        url, query, headers = path, [], {}
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                url = url.replace(f"{{{parameter['name']}}}", quoted(self.value(parameter["schema"])))
            elif parameter["required"] or self.random.random() < 0.6:
                value = self.value(parameter["schema"])
                if parameter["in"] == "query":
                    query.append(f"{parameter['name']}={quoted(value)}")
                else:
                    headers[parameter["name"]] = printable(value)
        body = self.body(operation.get("requestBody"), headers)
        return method.upper(), url + ("?" + "&".join(query) if query else ""), headers, body, operation

    def body(self, declared, headers):
        if declared is None:
            return b""
        kind = self.random.choice(list(declared["content"]))
        if self.random.random() < 0.05:
            headers["content-type"] = self.random.choice(["text/plain", "multipart/form-data", "application/json", "x"])
            return self.random.randbytes(self.random.randrange(200))
        headers["content-type"] = kind
        if kind == "application/json":
            value = self.value(declared["content"][kind]["schema"])
            return json.dumps(value).encode() if self.random.random() < 0.95 else self.random.randbytes(30)
        if kind == "multipart/form-data":
            headers["content-type"] += "; boundary=edge"
            parts = [("image", '; filename="a.png"', self.image()), ("label", "", printable(self.text()).encode())]
            chosen = [part for part in parts if self.random.random() < 0.9]
            made = b"".join(
                b'--edge\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
                % (name.encode(), extra.encode(), each)
                for name, extra, each in chosen
            )
            return made + b"--edge--\r\n"
        return self.image()

    def image(self):
        content = png(self.random.randrange(20), self.random.randrange(3))
        chance = self.random.random()
        if chance < 0.5:
            return content
        if chance < 0.7:
            return content[: self.random.randrange(len(content))]
        damaged = bytearray(content)
        for _ in range(5):
            damaged[self.random.randrange(len(damaged))] = self.random.randrange(256)
        return bytes(damaged)

    def text(self):
        return self.random.choice(ODD_TEXT)

    def value(self, schema):
        if "$ref" in schema:
            schema = self.schema["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        if self.random.random() < 0.1:
            return self.random.choice([*ODD_NUMBERS, *ODD_TEXT])
        if "anyOf" in schema:
            return self.value(self.random.choice(schema["anyOf"]))
        kind = schema.get("type")
        if kind == "object":
            return {
                name: self.value(inner)
                for name, inner in schema.get("properties", {}).items()
                if name in schema.get("required", []) or self.random.random() < 0.7
            }
        if kind == "array":
            return [self.value(schema["items"]) for _ in range(self.random.choice([1, 1, 2, 3, 0]))]
        if kind == "integer":
            return self.random.choice(
                [schema.get("minimum", 1), self.random.randrange(1, 60), self.random.choice([1, 5])]
            )
        if kind == "null":
            return None
        return self.text()


def quoted(value):
    from urllib.parse import quote

    return quote(printable(value).encode("utf-8", "surrogatepass"), safe="")


def printable(value):
    """As a header or a query carries it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\n", " ").replace("\r", " ").replace("\x00", " ")


def violations(schema, operation, status, headers, content):
    """What an answer has that the schema does not allow."""
    allowed = operation["responses"].get(str(status))
    if allowed is None:
        return [f"status {status} is not in the schema"]
    kinds = allowed.get("content", {})
    kind = headers.get("content-type", "").partition(";")[0]
    if kinds and kind not in kinds:
        return [f"{kind} is none of {sorted(kinds)}"]
    return [] if kind != "application/json" else differences(schema, kinds[kind]["schema"], json.loads(content))


def differences(schema, wanted, value, place="answer"):
    """Where JSON does not fit a schema: the part of JSON Schema that our answers use."""
    if "$ref" in wanted:
        wanted = schema["components"]["schemas"][wanted["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in wanted:
        found = [differences(schema, one, value, place) for one in wanted["anyOf"]]
        return [] if [] in found else found[0]
    kinds = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
        "object": dict,
    }  # fmt: skip
    if not isinstance(value, kinds[wanted["type"]]) or (isinstance(value, bool) and wanted["type"] != "boolean"):
        return [f"{place} is {value!r}, not {wanted['type']}"]
    if wanted["type"] == "array":
        return [one for row in value for one in differences(schema, wanted["items"], row, f"{place}[]")]
    if wanted["type"] == "object":
        missing = [f"{place} lacks {name}" for name in wanted.get("required", []) if name not in value]
        inner = [
            one
            for name, each in wanted["properties"].items()
            if name in value
            for one in differences(schema, each, value[name], f"{place}.{name}")
        ]
        return missing + [f"{place}.{name} is new" for name in value.keys() - wanted["properties"].keys()] + inner
    return []


# ---- harnesses -----------------------------------------------------------------------------------------------------


def abuse(port, kind):
    """One hostile connection; returns what the server said."""
    head = b"POST /api/identify HTTP/1.1\r\nHost: localhost\r\n"
    upload = head + b"Content-Type: multipart/form-data; boundary=e\r\n"
    part = b'--e\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n'
    attacks = {
        "huge length": head + b"Content-Length: 99999999999999999999\r\n\r\nx",
        "negative length": head + b"Content-Length: -5\r\n\r\nx",
        "two lengths": head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "length and chunks": head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "no length": head + b"\r\n",
        "bad chunk": head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n",
        "huge chunk": head + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\nhello",
        "unfinished chunk": head + b"Transfer-Encoding: chunked\r\n\r\nFF\r\nhello",
        "hang up": head + b"Content-Length: 100000\r\n\r\nhello",
        "10001 parts": upload + b"Content-Length: %d\r\n\r\n" % (10_001 * len(part) + 7) + 10_001 * part + b"--e--\r\n",
        "no boundary": head + b"Content-Type: multipart/form-data\r\nContent-Length: 5\r\n\r\nhello",
        "endless part": upload + b"Content-Length: 60000\r\n\r\n" + b"--e\r\n" + b"A" * 59_995,
        "many headers": b"GET /api/health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(9000)) + b"\r\n",
        "long header": b"GET /api/health HTTP/1.1\r\nX: " + b"A" * 200_000 + b"\r\n\r\n",
        "long path": b"GET /" + b"A" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "no host": b"GET /api/health HTTP/1.1\r\n\r\n",
        "two hosts": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        "odd host": b"GET /api/health HTTP/1.1\r\nHost: [::1\r\n\r\n",
        "old version": b"GET /api/health HTTP/0.9\r\n\r\n",
        "garbage": os.urandom(500),
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200),
        "upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "absolute": b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        "connect": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "pipeline": 50 * b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "null bytes": b"GET /api/\x00health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }
    content = attacks[sorted(attacks)[kind % len(attacks)]]
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(3)
        return connection.recv(65536)
    return b""


def loris(port, stop):
    """A client that sends one byte of its head at a time, until it is dropped; returns the seconds that took."""
    started = time.monotonic()
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        for byte in b"POST /api/identify HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000:
            connection.sendall(bytes([byte]))
            if stop.wait(0.5):
                break
    return time.monotonic() - started


async def many_clients(application, count, key=None):
    """Identify from `count` clients at once; returns the answers."""
    import httpx2

    transport = httpx2.ASGITransport(app=application)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        images = [png(person % 12, 5) for person in range(count)]
        return await asyncio.gather(*(client.post("/api/identify", content=image) for image in images))


STEPS = {0: ["enroll"], 1: ["enroll", "rename"], 2: ["enroll", "remove"]}  # what comes of a person, by number % 3


def send(server, step, person):
    """One request under the key that belongs to it; (status, answer)."""
    key = {"Idempotency_Key": f"{step} {person}"}
    if step == "enroll":
        return server.post(f"/api/enroll?label=p{person}", png(person), **key)
    wanted = {"label": f"p{person}"} | ({"new_label": f"q{person}"} if step == "rename" else {})
    return server.post(f"/api/{step}", json.dumps(wanted).encode(), Content_Type="application/json", **key)


class Client:
    """What clients have asked of a server that dies, and what it has answered."""

    def __init__(self):
        self.answers, self.lost, self.wrong = {}, {}, []  # by (step, person), in the order of the steps

    def attempt(self, server, step, person):
        """Ask once; an exception leaves the request among the lost."""
        self.lost[step, person] = None
        status, answer = send(server, step, person)
        if status in (200, 201):
            self.answers[step, person] = answer
        else:
            self.wrong.append(("refused", step, person, status, answer))
        del self.lost[step, person]

    def work(self, server, people, stop):
        """All steps of some people, until the server is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):  # killed, or half an answer
            for person in people:
                for step in STEPS[person % 3]:
                    if stop.is_set():
                        return
                    self.attempt(server, step, person)

    def expected(self):
        """Templates that must be there: id to label."""
        found = {}
        for (step, person), answer in self.answers.items():
            if step == "enroll":
                found[person] = (answer["id"], f"p{person}")
            elif person in found:  # else its enrollment was refused, which is among the wrong
                template, _ = found.pop(person)
                found |= {person: (template, f"q{person}")} if step == "rename" else {}
        return dict(found.values())


def kill_rounds(folder, rounds, seed=0, options=()):
    """kill -9 under load, again and again: what was acknowledged stays, and repeating it changes nothing.

    Returns:
        Acknowledged requests, how many were tried again after a lost answer, and what is wrong at the end.
    """
    generator, client, number, tried_again = random.Random(seed), Client(), 0, 0
    make_gallery(folder, 2, calibrated=False)
    for _ in range(rounds):
        server, stop = Server(folder, *options).start(), threading.Event()
        tried_again += len(client.lost)
        for request in list(client.lost):
            client.attempt(server, *request)
        people = [range(number + 50 * i, number + 50 * i + 50) for i in range(4)]
        threads = [threading.Thread(target=client.work, args=(server, part, stop)) for part in people]
        number += 200
        for each in threads:
            each.start()
        time.sleep(generator.uniform(0.01, 0.3))
        server.stop(kill=True)
        stop.set()
        for each in threads:
            each.join()
    with Server(folder) as server:
        tried_again += len(client.lost)
        for request in list(client.lost):
            client.attempt(server, *request)
        for request, answer in client.answers.items():
            again = send(server, *request)[1]
            if again != answer:
                client.wrong.append(("other answer", request, answer, again))
    with Gallery.open(folder, embedder(), read_only=True) as gallery:
        stored = gallery.embeddings()
    rows = {pair for pair in zip(stored.ids.tolist(), stored.labels, strict=True) if pair[1][1:].isdigit()}
    expected = set(client.expected().items())
    client.wrong += [("lost", pair) for pair in expected - rows] + [("not asked for", pair) for pair in rows - expected]
    return len(client.answers), tried_again, client.wrong


def acknowledge_early():
    """The planted bug: say that a template is enrolled a moment before it is."""
    from embedlab.serving.app import Service

    honest = Service._change
    given = {}

    async def early(self, work, *, refused):
        if refused != 422:  # no enrollment
            return await honest(self, work, refused=refused)
        given[self] = given.get(self, self.gallery._store.meta().last_id) + 1
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, loop.run_in_executor, self._writing, work)
        return [given[self]]

    Service._change = early


if __name__ == "__main__":
    import logging

    from embedlab.serving.server import serve

    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--inbox", type=float)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--early", action="store_true", help="the planted bug")
    chosen = parser.parse_args()
    if chosen.early:
        acknowledge_early()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    serve(
        chosen.folder,
        embedder(),
        port=chosen.port,
        key_file=chosen.key_file,
        inbox_days=chosen.inbox,
        read_only=chosen.read_only,
    )
