"""The page at /, in headless Chromium: at two widths, light and dark, by keyboard alone, and with hostile text."""

import base64
import hashlib
import itertools
import json
import re

import httpx
import pytest
from chromium import chromium
from server import served

from libortho.serving.config import ServeConfig
from libortho.serving.keys import digest, entry
from libortho.serving.server import local_app
from tiny import HR, LEGAL

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "lo-secret-key-of-both"
LOOKS = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
HOSTILE = "<img src=x onerror=\"window.hit=1\"><script>window.hit=1</script><b id='bold'>&amp;"


@pytest.fixture(scope="module")
def address(two_streams, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "keys.toml"
    keys = {"both": (KEY, {"hr": 1.0, "legal": 1.0}), "half": ("lo-half", {"hr": 0.5})}
    path.write_text("\n".join(entry(n, digest(k), allowed, None) for n, (k, allowed) in keys.items()))
    with served(local_app(two_streams, tokenizer, ServeConfig(keys=path, most_rows=4), "tiny")) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


class Seen:
    """A page that is open, and what it did."""

    def __init__(self, browser, address, width=1280, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.context.set_default_timeout(20_000)
        self.page, self.address = self.context.new_page(), address
        self.console, self.requests = [], []
        self.page.on("console", lambda m: self.console.append(m.text))
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))

    def open(self, key=None):
        self.page.goto(self.address)
        if key is not None:
            self.page.fill("#key", key)
            self.page.click("#load")
            self.page.wait_for_selector("#share-b input, #share-b .soft:has-text('opens no stream')")
        return self.page

    def ask(self, prompt, tokens=6):
        self.page.fill("#prompt", prompt)
        self.page.fill("#most", str(tokens))
        self.page.click("#ask")
        self.ended()

    def ended(self):
        self.page.wait_for_selector("#ask:not([aria-disabled])")

    def scrolls(self):
        return self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@pytest.fixture
def seen(browser, address):
    opened = []

    def make(*args):
        opened.append(Seen(browser, address, *args))
        return opened[-1]

    yield make
    for one in opened:
        one.context.close()


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_two_answers_side_by_side(seen, width, scheme):
    one = seen(width, scheme)
    page = one.open(KEY)
    assert not one.scrolls()
    page.fill("#alpha-b-1-number", "0")
    one.ask(HR[0]["prompt"])
    assert page.text_content("#error") == ""
    a, b = page.text_content("#text-a"), page.text_content("#text-b")
    assert b.startswith(HR[0]["completion"])
    assert a != b
    strong = page.locator("#text-b").locator(".l2, .l3")
    assert strong.count() >= 1
    assert "times as likely here" in strong.first.get_attribute("title")
    plain = page.locator(".key .l0")
    look = "e => { const s = getComputedStyle(e); return [s.backgroundColor, s.textDecorationStyle]; }"
    assert strong.first.evaluate(look) != plain.first.evaluate(look)
    assert strong.first.evaluate(look)[1] in ("solid", "double")  # not by colour alone
    assert page.locator("#table-b tr").count() == page.locator("#text-b .token").count()
    assert [c.split(":")[0] for c in page.locator("#layers > div > table caption").all_text_contents()] == ["Stream hr"]
    for summary in page.locator("summary").all():
        summary.click()
    assert not one.scrolls()
    boxes = [page.locator(f"#text-{s}").bounding_box() for s in "ab"]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    assert one.console == []
    assert {u for u in one.requests if not u.startswith((one.address, "data:"))} == set()


def test_colours_of_the_page_are_readable(seen):
    for scheme in ("light", "dark"):
        page = seen(1280, scheme).open()
        for selector in ("p", ".soft", "label", "#ask", ".key .l0", ".key .l1", ".key .l2", ".key .l3", "button#load"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)


def contrast(page, selector):
    """WCAG's contrast of a text with what is behind it."""
    colours = page.eval_on_selector(
        selector,
        """e => { const found = [getComputedStyle(e).color]; let at = e;
        while (getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
        return [...found, getComputedStyle(at).backgroundColor]; }""",
    )
    light = []
    for colour in colours:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        light.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_everything_goes_by_keyboard(seen):
    one = seen(390)
    page = one.open()

    def to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                width, style = page.evaluate(
                    "(s => [parseFloat(s.outlineWidth), s.outlineStyle])(getComputedStyle(document.activeElement))"
                )
                assert width >= 1
                assert style != "none"  # the focus shows
                return
        raise AssertionError(f"no way to {name}")

    to("key")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#alpha-b-1")
    to("alpha-b-0")
    page.keyboard.press("Home")
    assert page.input_value("#alpha-b-0-number") == "0"
    to("prompt")
    page.keyboard.type(LEGAL[0]["prompt"])
    to("plain")
    to("most")
    page.keyboard.press("Control+a")
    page.keyboard.type("6")
    to("ask")
    page.keyboard.press("Enter")
    one.ended()
    assert page.text_content("#text-b").startswith(LEGAL[0]["completion"])
    assert page.locator("#layers caption").count() == 1  # hr is the same on both sides
    assert one.console == []


def test_it_can_be_read_by_a_screen_reader(seen):
    one = seen()
    page = one.open(KEY)
    for name in ("Key", "Prompt", "Longest answer, in tokens"):
        assert page.get_by_label(name, exact=True).count() == 1
    for name in ("hr", "legal"):
        assert page.get_by_role("slider", name=name, exact=True).count() == 2
        assert page.get_by_role("spinbutton", name=f"{name}, as a number").count() == 2
    assert page.get_by_role("group", name="Side A").count() == 1
    assert page.locator("[aria-live=polite]").count() == 1
    page.fill("#alpha-b-1-number", "0")
    one.ask(HR[0]["prompt"])
    status = page.text_content("#status")
    assert f"Side B says: “{HR[0]['completion']}" in status
    assert "tokens are more than twice as likely" in status
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button")].filter(
        e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)"""
    )
    assert unnamed == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_the_key_is_kept_nowhere(seen):
    one = seen()
    page = one.open(KEY)
    one.ask(HR[0]["prompt"])
    assert KEY not in page.content()
    assert KEY not in page.url
    assert not any(KEY in u for u in one.requests)
    held = page.evaluate(
        """async () => [localStorage.length, sessionStorage.length, document.cookie, history.length > 2,
        (await indexedDB.databases()).length, JSON.stringify(history.state)]"""
    )
    assert held == [0, 0, "", False, 0, "null"]
    assert one.context.cookies() == []
    page.reload()
    assert page.input_value("#key") == ""


def test_text_of_a_model_stays_text(seen):
    one = seen(390)
    models = {"data": [{"id": "tiny", "alpha": {HOSTILE: 1.0}}, {"id": f"tiny+{HOSTILE}"}]}
    events = [{"side": s, "token": HOSTILE, "text": HOSTILE, "logprob": -0.1} for s in "ab"]
    events += [{"side": s, "text": "", "finish": "stop"} for s in "ab"]
    events += [{"side": s, "place": 0, "other": -5.0} for s in "ab"]
    events += [{"layers": {HOSTILE: [{"layer": HOSTILE, "share": 0.5}]}}]
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
    one.page.route("**/v1/models", lambda r: r.fulfill(json=models))
    one.page.route("**/v1/contrast", lambda r: r.fulfill(body=body, content_type="text/event-stream"))
    page = one.open("k")
    one.ask("Hi")
    assert page.text_content("#error") == ""
    assert page.text_content("#text-a") == HOSTILE
    assert page.text_content("#share-a label") == HOSTILE
    assert HOSTILE in page.text_content("#layers")
    assert page.locator("main img, main script, #bold").count() == 0
    assert page.evaluate("window.hit") is None
    assert not one.scrolls()
    one.page.unroute("**/v1/contrast")
    wrong = {"error": {"message": HOSTILE}}
    one.page.route("**/v1/contrast", lambda r: r.fulfill(body=f"data: {json.dumps(wrong)}\n\n"))
    one.ask("Hi")
    assert HOSTILE in page.text_content("#error")
    assert page.locator("main img").count() == 0
    assert all(u.startswith((one.address, "data:")) for u in one.requests)


def test_what_goes_wrong_is_said_in_words(seen):
    one = seen()
    page = one.open()
    page.fill("#key", "lo-unknown")
    page.click("#load")
    page.wait_for_selector("#error:not(:empty)")
    assert page.text_content("#error") == "The server refuses: the key is not valid."
    page.fill("#key", KEY)
    one.ask("")
    assert page.text_content("#error") == "The prompt is empty. Write something first."
    one.ask("a" * 500)
    assert "the model reads 128" in page.text_content("#error")
    one.ask("Hi", 1000)
    assert "whole number from 1 to 256" in page.text_content("#error")
    one.page.route("**/v1/contrast", lambda r: r.abort())
    one.ask("Hi")
    assert "cannot be reached" in page.text_content("#error")


def test_a_key_with_a_part_of_a_stream_slides_as_far_as_that(seen):
    page = seen().open("lo-half")
    assert page.get_attribute("#alpha-b-0", "max") == "0.5"
    assert page.input_value("#alpha-b-0") == "0.5"
    assert page.input_value("#alpha-a-0") == "0"
    page = seen().open("")
    assert page.locator("input[type=range]").count() == 0


def test_an_answer_can_be_stopped(seen):
    one = seen()
    page = one.open(KEY)
    page.route("**/v1/contrast", lambda r: None)  # never answered
    page.fill("#prompt", "Hi")
    page.click("#ask")
    page.wait_for_selector("#status:has-text('Both sides')", state="attached")
    page.click("#stop")
    one.ended()
    assert page.text_content("#status") == "Stopped."
    assert page.text_content("#error") == ""
    assert page.is_disabled("#stop")


def test_the_page_allows_nothing_but_itself(address):
    found = httpx.get(address)
    assert found.headers["cache-control"] == "no-store"
    assert found.headers["content-type"].startswith("text/html")
    policy = dict(p.split(" ", 1) for p in found.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not re.search(r"https?:|//[a-z]|innerHTML|Storage|cookie|style=|\son\w+=", found.text.replace("'//'", ""))
