"""Reports: one file that asks nobody for anything, shows labels as labels, and fits a telephone."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from embedlab.cli import main
from embedlab.encoders import Encoder, LinearHead, ResNet
from embedlab.retrieval import Gallery
from embedlab.retrieval.audit import audit
from embedlab.serving import audit_report, draw_identifications, gallery_report
from embedlab.serving.html import VOID, Column, Html, Line, line_chart, nice_scale, page, picture, table, tag

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "' onmouseover=alert(3) '",
    "</title></style></script><b>",
    "javascript:alert(4)",
    "&lt;i&gt; & Ödön 李",
    "{{7*7}}${7*7}",
]


class Reader(HTMLParser):
    """Elements with their attributes, the text between them, and whether every element is closed in turn."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def require_harmless(document: str) -> Reader:
    """One script, which is ours, no event handlers, and nothing that is loaded from elsewhere."""
    found = Reader(document)
    assert len(found.all("script")) == 1
    for name, attributes in found.elements:
        assert name not in ("iframe", "object", "embed", "base", "form", "link")
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/"))
    assert not re.search(r"url\(|@import", document)
    return found


def filled(folder, labels: list[str], *, thumbnails: bool = False, rows: int = 3) -> Gallery:
    """A gallery of several templates of each label, with pictures when there are thumbnails."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (len(labels) * rows, 3, 8, 8), dtype=np.uint8)
    images = (0.2 * images + 0.8 * images[::rows].repeat(rows, axis=0)).astype(np.uint8)
    names = [label for label in labels for _ in range(rows)]
    gallery = Gallery.create(
        folder, lambda batch: np.asarray(batch, np.float32).reshape(len(batch), -1) - 127, thumbnails=thumbnails
    )
    gallery.enroll(images, labels=names)
    return gallery


@pytest.mark.parametrize("thumbnails", [False, True])
def test_hostile_labels_stay_text(tmp_path, thumbnails) -> None:
    with filled(tmp_path / "a<b>'\"", HOSTILE, thumbnails=thumbnails) as gallery:
        gallery.enroll(embeddings=gallery.embeddings().vectors[:1], labels=HOSTILE[1])  # a duplicate across labels
        found = require_harmless(gallery_report(gallery))
    for label in HOSTILE:
        assert label in found.text
    pictures = found.all("img")
    assert bool(pictures) == thumbnails
    assert ("No pictures are kept" in found.text) != thumbnails
    assert "a<b>'\"" in found.text
    assert "different labels" in found.text


def test_a_gallery_of_nobody_and_of_one(tmp_path) -> None:
    with Gallery.create(tmp_path / "g", dim=2) as gallery:
        assert "No promise yet" in require_harmless(gallery_report(gallery)).text
        gallery.enroll(embeddings=[[1, 0]], labels=["Ada"])
        text = require_harmless(gallery_report(gallery)).text
        assert "here are 1" in text
        assert "Ada" in text


def test_the_promise_is_told_in_words_and_drawn(tmp_path) -> None:
    random = np.random.default_rng(0)
    with Gallery.create(tmp_path / "g", dim=16) as gallery:
        gallery.enroll(embeddings=random.normal(size=(20, 16)), labels=[f"p{row % 10}" for row in range(20)])
        found = gallery.calibrate(embeddings=random.normal(size=(100, 16)), fpir=0.05)
        reader = require_harmless(gallery_report(gallery))
        assert "at most 5.00% are taken for somebody enrolled, with 95% confidence" in reader.text
        assert f"Upper bound {found.bound:.2%}" in reader.text
        assert f"{found.threshold:.4f}" in reader.text
        assert "calibrated" in reader.text
        assert len(reader.all("path")) >= 2
        assert "outgrown its calibration" not in reader.text
        gallery.enroll(embeddings=random.normal(size=(30, 16)), labels=[f"q{row}" for row in range(30)])
        assert "outgrown its calibration" in require_harmless(gallery_report(gallery)).text


def test_pictures_come_from_stored_paths_and_bad_files_are_tiles(tmp_path) -> None:
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    notes = [{"path": str(tmp_path / name)} for name in ("red.png", "broken.png", "absent.png")] + [{"path": 7}]
    with Gallery.create(tmp_path / "g", dim=4) as gallery:
        gallery.enroll(embeddings=np.eye(4), labels=["red", "broken", "absent", "number"], metadata=notes)
        found = require_harmless(gallery_report(gallery))
    sources = {image["src"] for image in found.all("img")}
    assert len(sources) == 1
    with Image.open(BytesIO(base64.b64decode(sources.pop().split(",")[1]))) as image:
        assert max(image.size) <= 128
        assert np.abs(np.asarray(image.convert("RGB")).mean((0, 1)) - (200, 30, 30)).max() < 5


def test_an_audit_names_what_it_found() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 16)).repeat(4, axis=0) + random.normal(0, 0.2, (240, 16))
    labels = [f"<{row // 4}>" for row in range(240)]
    labels[6] = labels[100]
    found = audit(vectors, labels, range(1000, 1240), fpir=0.05)
    reader = require_harmless(audit_report(found, labels, list(range(1000, 1240))))
    row = next(body for body in re.split("May be mislabelled", reader.text)[1:])
    assert "1006" in row
    assert "<25>" in row
    refused = replace(found, calibration=None, refusal="too few <strangers>", threshold=None, confusable=())
    assert "too few <strangers>" in require_harmless(audit_report(refused, labels, list(range(1000, 1240)))).text


def test_pieces_escape_everything_but_markup() -> None:
    assert tag("p", "<", Html("<b>"), [1, None], title='"') == '<p title="&quot;">&lt;<b>1</p>'
    assert picture(None, "<x").count("&lt;") == 2
    reader = require_harmless(page("<t>", table([Column("<h>"), Column("n", number=True, digits=2)], [["<c>", 1 / 3]])))
    assert "<h>" in reader.text
    assert "<c>" in reader.text
    assert "0.33" in reader.text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.92), (-0.2, 0.31), (5, 5), (0, 1e-4), (-3, 1200)])
def test_scales_end_on_round_numbers_around_the_data(low, high) -> None:
    first, last, values = nice_scale(low, high)
    assert first <= low <= high <= last
    assert values[0] == first
    assert values[-1] == last
    assert 3 <= len(values) <= 9
    np.testing.assert_allclose(np.diff(values), values[1] - values[0])


def test_measured_points_are_marked_where_asked() -> None:
    points = [(0.0, 1.0), (1.0, 0.5), (3.0, 0.25)]
    chart = line_chart([Line("rain", points, dots=True), Line("haze", points)], x="severity", y="recall")
    places = re.findall(r'd="M([^"Z]+)"', chart)[0].split("L")
    assert [f"{x} {y}" for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', chart)] == places


def test_lines_lie_where_their_points_are() -> None:
    chart = line_chart([Line("a", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])], x="x", y="y", mark=(0.5, "half"))
    places = [tuple(map(float, place.split())) for place in re.search(' d="M([^"]+)"', chart)[1].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x0 + x2) / 2 == pytest.approx(x1, abs=0.1)
    assert (y0 + y2) / 2 == pytest.approx(y1, abs=0.1)
    assert y0 > y2
    assert f'x1="{x1:.1f}"' in chart
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([], x="x", y="y")


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """A gallery made from files on disk by the command line, and the files."""
    root = tmp_path_factory.mktemp("door")
    random = np.random.default_rng(0)
    for name in ("Ada", "Grace", "Emmy"):
        (root / "people" / name).mkdir(parents=True)
        colour = random.integers(0, 256, 3)
        for copy in range(3):
            pixels = (colour + random.normal(0, 20, (24, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "people" / name / f"{copy}.png")
    Encoder(ResNet("resnet10", stem="small", width=0.125), LinearHead(8), image_size=16).eval().save(root / "encoder")
    assert main(["gallery", "create", str(root / "g"), "--encoder", str(root / "encoder"), "--thumbnails"]) == 0
    assert main(["gallery", "enroll", str(root / "g"), str(root / "people")]) == 0
    return root


def test_the_command_writes_a_report(door, capsys) -> None:
    out = door / "new" / "report.html"
    capsys.readouterr()
    assert main(["gallery", "report", str(door / "g"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out), "bytes": out.stat().st_size}
    found = require_harmless(out.read_text(encoding="utf-8"))
    assert len(found.all("img")) >= 9
    assert "Grace" in found.text


def test_identify_shows_queries_answers_and_neighbours(door, capsys) -> None:
    people = door / "people"
    out = door / "shown" / "answers.png"
    images = [str(people / "Ada" / "0.png"), str(people / "Emmy")]
    capsys.readouterr()
    assert main(["gallery", "identify", str(door / "g"), *images, "-k", "2", "--show", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["best"] for row in rows] == ["Ada", "Emmy", "Emmy", "Emmy"]
    assert rows[0]["probe"] == images[0]
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for name in ("Ada", "Emmy"):  # both colours are on the sheet, as query and as neighbour
        with Image.open(people / name / "0.png") as image:
            colour = np.asarray(image).mean((0, 1))
        assert (np.abs(pixels - colour).max(axis=2) < 40).sum() > 1000


def test_answers_without_pictures_are_neutral_tiles(tmp_path) -> None:
    with Gallery.create(tmp_path / "g", dim=2) as gallery:
        gallery.enroll(embeddings=[[1, 0], [0, 1]], labels=["$a_1$", "b" * 90])
        answers = gallery.identify(embeddings=[[1, 0.1]] * 25, k=3)
    draw_identifications(tmp_path / "a.png", answers, [None] * 25, lambda _key: None)
    with Image.open(tmp_path / "a.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert (0xF3, 0xF4, 0xF6) in colours


def test_a_browser_loads_nothing_and_needs_no_sideways_scrolling(tmp_path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER: pip install playwright")

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("NO BROWSER: the layout of reports is not looked at; install chromium.")
    with filled(
        tmp_path / "g", [*HOSTILE, "a long name without a single space " + "x" * 80], thumbnails=True
    ) as gallery:
        (tmp_path / "report.html").write_text(gallery_report(gallery), encoding="utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for width, scripted in ((1280, True), (390, True), (390, False)):
            context = browser.new_context(viewport={"width": width, "height": 800}, java_script_enabled=scripted)
            opened = context.new_page()
            said: list[str] = []
            asked: list[str] = []
            opened.on("console", lambda message, said=said: said.append(message.text))
            opened.on("pageerror", lambda error, said=said: said.append(str(error)))
            opened.on("dialog", lambda dialog, said=said: said.append(dialog.message))
            opened.on("request", lambda request, asked=asked: asked.append(request.url))
            opened.goto((tmp_path / "report.html").as_uri())
            assert opened.locator("body").bounding_box()["width"] <= width
            assert not [url for url in asked if not url.startswith(("file:", "data:"))]
            assert opened.locator(".grid .item").first.is_visible()
            if scripted:
                assert opened.evaluate("document.documentElement.scrollWidth") <= width
                opened.get_by_role("searchbox").fill("ödön")
                assert opened.locator("#identities .item:visible").count() == 1
            assert said == []
            context.close()
        browser.close()
