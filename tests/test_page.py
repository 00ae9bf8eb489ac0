"""The page in a real browser: what people do, at a phone's and a desktop's width.

`EMBEDLAB_SCREENSHOTS=docs/images pytest tests/test_page.py -k pictures` writes the pictures of docs/serving.md.
"""

import os
import shutil
from pathlib import Path

import pytest
from harness_serving import Server, make_gallery, png

playwright = pytest.importorskip("playwright.sync_api", reason="BROWSER TESTS SKIPPED: pip install playwright")
expect = playwright.expect

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="BROWSER TESTS SKIPPED: no chromium; apt-get install chromium")
NAMES = ["Ada Lovelace", "Grace Hopper", "Emmy Noether", "Katherine Johnson", "Mary Jackson", "Sofja Kowalewskaja",
         "Hedy Lamarr", "Dorothy Vaughan", "Rosalind Franklin", "Lise Meitner", "Chien-Shiung Wu",
         "Maryam Mirzakhani"]  # fmt: skip
HOSTILE = '<img src=x onerror="document.title=1">'
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield found
        found.close()


@pytest.fixture
def server(tmp_path):
    with Server(make_gallery(tmp_path / "door", names=NAMES, thumbnails=True), "--inbox", "7") as started:
        yield started


@pytest.fixture
def open_page(browser, server):
    """Open the page at a width; afterwards no error was logged and nothing was asked of another server."""
    contexts, trouble = [], []

    def start(viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, permissions=["camera"], **options)
        contexts.append(context)
        page = context.new_page()
        home = f"http://127.0.0.1:{server.port}/"
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on(
            "request", lambda request: None if request.url.startswith((home, "blob:")) else trouble.append(request.url)
        )
        page.goto(home)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not trouble


def show(page, content):
    page.set_input_files("#file", {"name": "probe.png", "mimeType": "image/png", "buffer": content})


def test_look_enroll_undo_remove(open_page):
    page = open_page()
    expect(page.locator("#summary")).to_contain_text("12 identities")
    show(page, png(3, 9))
    expect(page.locator("#decision")).to_have_text("Katherine Johnson")
    expect(page.locator("#verdict")).to_have_text("Known")
    expect(page.locator("#scale")).to_contain_text("threshold 0.")
    expect(page.locator("#neighbours li")).to_have_count(5)
    expect(page.locator("#neighbours img").first).to_be_visible()
    expect(page.locator("#curve svg")).to_be_visible()

    show(page, png(777))
    expect(page.locator("#decision")).to_have_text("Unknown")
    page.fill("#name", "Vera Rubin")
    page.press("#name", "Enter")
    expect(page.locator("#toast-text")).to_have_text("Enrolled as Vera Rubin")
    expect(page.locator("#total")).to_have_text("13")
    page.click("#undo")
    expect(page.locator("#total")).to_have_text("12")

    page.fill("#filter", "ada")
    page.get_by_role("button", name="Remove Ada Lovelace").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#total")).to_have_text("12")
    page.get_by_role("button", name="Remove Ada Lovelace").click()
    page.click("#confirm-yes")
    expect(page.locator("#total")).to_have_text("11")
    show(page, png(0, 9))
    expect(page.locator("#decision")).to_have_text("Unknown")


def test_strangers_are_named_and_dismissed(open_page):
    page = open_page()
    for seen, (person, shot) in enumerate(((500, 0), (500, 1), (501, 0)), start=1):
        show(page, png(person, shot))
        expect(page.locator("#clusters .picture img")).to_have_count(seen)
    expect(page.locator("#clusters > li")).to_have_count(2)
    expect(page.locator("#clusters > li").first).to_contain_text("2 images")
    page.locator("#clusters input").first.fill("Vera Rubin")
    page.locator("#clusters button.primary").first.click()
    expect(page.locator("#clusters > li")).to_have_count(1)
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator("#clusters > li")).to_have_count(0)
    show(page, png(500, 2))
    expect(page.locator("#decision")).to_have_text("Vera Rubin")


def test_names_are_text_and_scripts_do_not_run(open_page):
    page = open_page()
    show(page, png(800))
    page.fill("#name", HOSTILE)
    page.press("#name", "Enter")
    expect(page.locator("#identities")).to_contain_text(HOSTILE)
    show(page, png(800, 1))
    expect(page.locator("#decision")).to_have_text(HOSTILE)
    assert page.title() == "Gallery · embedlab"


def test_drop_paste_and_camera(open_page):
    page = open_page()
    hand_over = """async ([kind, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "x.png", {type: "image/png"}));
        const options = {bubbles: true, cancelable: true};
        document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", {...options, dataTransfer: transfer})
            : new ClipboardEvent("paste", {...options, clipboardData: transfer}));
    }"""
    page.evaluate(hand_over, ["drop", list(png(1, 9))])
    expect(page.locator("#decision")).to_have_text("Grace Hopper")
    page.evaluate(hand_over, ["paste", list(png(2, 9))])
    expect(page.locator("#decision")).to_have_text("Emmy Noether")
    page.click("#camera")
    expect(page.locator("#video")).to_have_js_property("readyState", 4)
    page.click("#shoot")
    expect(page.locator("#decision")).to_have_text("Unknown")
    expect(page.locator("#video")).to_be_hidden()


def test_a_file_that_is_no_image_is_refused_in_words(browser, server):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    show(page, b"no image")
    expect(page.locator("#notice")).to_contain_text("no whole image")
    page.close()


def test_everything_is_reached_by_keyboard(open_page):
    page = open_page()
    show(page, png(3, 9))
    expect(page.locator("#decision")).to_have_text("Katherine Johnson")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached[0] == "Skip to the image"
    assert {"choose", "camera", "name", "filter", "Enroll", "Remove"} <= set(reached)
    nameless = "[...document.querySelectorAll('button, input')].filter(e => e.checkVisibility() && !e.labels?.length"
    assert page.evaluate(f"{nameless} && !e.ariaLabel && !e.textContent.trim()).length") == 0


def test_enrolling_taking_back_and_removing_by_keyboard_alone(open_page):
    page, under_way = open_page(), set()
    page.on("request", lambda request: under_way.add(request))
    page.on("requestfinished", lambda request: under_way.discard(request))
    page.on("requestfailed", lambda request: under_way.discard(request))
    page.clock.install()
    show(page, png(777))
    expect(page.locator("#decision")).to_have_text("Unknown")

    def tab_to(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches('{selector}')"):
                return
        raise AssertionError(f"{selector} is not reached")

    def settle(total):
        """Wait for all pictures: one that is still on its way when its template goes is a 404 in the console."""
        expect(page.locator("#total")).to_have_text(total)
        while under_way:
            page.wait_for_timeout(20)

    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#look")).to_be_focused()
    tab_to("#name")
    page.keyboard.type("Vera Rubin")
    page.keyboard.press("Enter")
    expect(page.locator("#undo")).to_be_focused()
    settle("13")
    page.clock.fast_forward(60_000)  # however long one takes
    expect(page.locator("#toast")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#toast-text")).to_have_text("Taken back")
    expect(page.locator("#choose")).to_be_focused()
    page.clock.fast_forward(10_000)
    expect(page.locator("#toast")).to_be_hidden()

    ada = '[aria-label="Remove Ada Lovelace"]'
    tab_to(ada)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(ada)).to_be_focused()
    settle("12")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#confirm-yes")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#total")).to_have_text("11")
    expect(page.locator("#filter")).to_be_focused()

    tab_to("#clusters input")
    page.keyboard.type("Vera Rubin")
    page.keyboard.press("Enter")
    expect(page.locator("#strangers")).to_be_focused()
    expect(page.locator("#total")).to_have_text("12")


def test_the_key_is_asked_for(browser, tmp_path):
    key = tmp_path / "key"
    key.write_text("correct horse battery\n".replace(" ", "-"))
    key.chmod(0o600)
    with Server(make_gallery(tmp_path / "door", 2, calibrated=False), "--key-file", str(key)) as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.fill("#key", "wrong-key-wrong-key")
        page.press("#key", "Enter")
        expect(page.locator("#key-wrong")).to_be_visible()
        page.fill("#key", key.read_text())
        page.press("#key", "Enter")
        expect(page.locator("#summary")).to_contain_text("2 identities")
        page.close()


@pytest.mark.parametrize(("name", "viewport"), [("phone", PHONE), ("desktop", DESKTOP)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_nothing_is_wider_than_the_screen(open_page, tmp_path, name, viewport, scheme):
    page = open_page(viewport, color_scheme=scheme, device_scale_factor=1)
    for shot in range(3):
        show(page, png(500, shot))
        expect(page.locator("#clusters .picture img")).to_have_count(shot + 1)
    show(page, png(3, 9))
    expect(page.locator("#decision")).to_have_text("Katherine Johnson")
    expect(page.locator("#neighbours img")).to_have_count(5)
    expect(page.locator("#identities img")).to_have_count(12)
    folder = Path(os.environ.get("EMBEDLAB_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"serving-{name}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter(e => e.checkVisibility() && e.offsetHeight < 36).length"
    )
    assert small == 0
