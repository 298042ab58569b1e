"""The page of `edge-steer serve`, in a real browser, on a server that says slowly at which dial it talks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the page is tested in a browser: pip install -e '.[dev]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested in a browser: pip install -e '.[dev]'")

from fake_server import HAPPY, PAGE, FakeServer, Knobs  # noqa: E402
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect  # noqa: E402

BROWSER = os.environ.get("EDGE_STEER_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
ANSWER = "article.answer"
LONG = 2000  # words, more than a test waits for


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no chromium to test the page in: install it, or name one by EDGE_STEER_BROWSER")
    with sync_api.sync_playwright() as playwright:
        # As root, as in a container, chromium starts without its sandbox only; it shows nothing but our own page.
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.kill()


@pytest.fixture
def knobs(server: FakeServer) -> Knobs:
    return server.reset()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1280, "height": 800}) as made:
        made.set_default_timeout(10_000)
        yield made


@pytest.fixture
def page(context: BrowserContext, server: FakeServer, knobs: Knobs) -> Iterator[Page]:
    faults: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda line: faults.extend([line.text] if "Security Policy" in line.text else []))
    opened.goto(server.url)
    expect(opened.locator(".card")).to_have_count(2)
    yield opened
    assert not faults, "errors of scripts, or of the content security policy"


def ask(page: Page, prompt: str) -> None:
    page.get_by_label("Message").fill(prompt)
    page.keyboard.press("Enter")


def answered(page: Page, prompt: str = "Hello") -> Locator:
    """The last answer, once it is whole."""
    ask(page, prompt)
    expect(page.get_by_role("button", name="Send")).to_be_visible()  # Stop stands there from the key press on
    return page.locator(ANSWER).last


def stop(page: Page) -> None:
    """End an answer that is longer than any test, whatever else the machine does."""
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def turn(page: Page, name: str, number: float) -> None:
    page.get_by_label(f"{name}, number").fill(str(number))


# --- the dial --------------------------------------------------------------------------------------------------------


def test_an_answer_is_asked_for_at_all_dials_and_says_at_which_it_was_given(page: Page, knobs: Knobs) -> None:
    answer = answered(page)
    assert knobs.requests[0]["steering"] == {"happy": 4.1, "formal": None}
    assert "stream" in knobs.requests[0]
    expect(answer.locator(".chip")).to_have_text(["happy +4.1°"])
    expect(answer.locator(".text")).to_contain_text("happy4.1 happy4.1")


def test_a_slider_moved_during_an_answer_turns_the_words_that_follow(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    ask(page, "Hello")
    answer = page.locator(ANSWER)
    expect(answer.locator(".text")).to_contain_text("happy4.1 happy4.1")
    box = page.locator("#dial-0-range").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.66, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    there = float(page.get_by_label("happy, number").input_value())
    assert there < -4
    expect(answer.locator(".text")).to_contain_text(f"happy{there:g} happy{there:g}")
    expect(answer.locator(".moved").last).to_contain_text(f"−{-there:g}°")
    stop(page)
    assert knobs.moves[-1] == {"happy": there, "formal": None}
    assert len(knobs.moves) <= 12, "a drag is not one request an event"
    underlined = answer.locator(".said")
    expect(underlined.first).to_have_attribute("data-tone", "warm")
    expect(underlined.last).to_have_attribute("data-tone", "cool")


def test_a_dial_switched_off_while_it_talks_leaves_the_rest_plain(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    ask(page, "Hello")
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    page.get_by_role("switch", name="happy, on").click()
    expect(page.locator(".text")).to_contain_text("plain plain")
    expect(page.locator(".chip")).to_have_text(["happy +4.1° → off"])
    stop(page)


def test_a_number_beyond_the_safe_range_is_sent_and_warned_of(page: Page, knobs: Knobs) -> None:
    page.get_by_label("happy, number").fill("9999")  # more than the server takes: the number before it holds
    expect(page.get_by_label("happy, number")).to_have_attribute("aria-invalid", "true")
    turn(page, "happy", -20)
    expect(page.get_by_text("Beyond the safe range")).to_be_visible()
    answered(page)
    assert knobs.requests[0]["steering"]["happy"] == -20
    assert float(page.locator("#dial-0-range").input_value()) == -20
    page.get_by_role("button", name="Reset to +4.1°").click()
    expect(page.get_by_text("Beyond the safe range")).to_have_count(0)


def test_ranges_and_ends_are_those_of_the_file(page: Page) -> None:
    cards = page.locator(".card")
    expect(cards.nth(0)).to_contain_text("Provisional range")
    expect(cards.nth(1)).to_contain_text("Safe range, measured")
    expect(cards.nth(0).locator(".tick")).to_have_text(["−8.2°", "+8.2°"])
    page.get_by_role("button", name="gloomy").click()
    expect(page.get_by_label("happy, number")).to_have_value("-8.2")


@pytest.mark.parametrize("changed", [{"operator": "ablation", "unit": "coefficient", "min": None, "max": None}])
def test_ablation_has_a_switch_and_no_slider(page: Page, knobs: Knobs, changed: dict[str, Any]) -> None:
    knobs.steerings = [{**HAPPY, **changed, "default": 1.0}]
    page.reload()
    expect(page.locator(".card")).to_have_count(1)
    expect(page.locator(".card input[type=range]")).to_have_count(0)
    expect(answered(page).locator(".chip")).to_have_text(["happy on"])


def test_without_a_measured_range_the_slider_still_turns(
    context: BrowserContext, server: FakeServer, knobs: Knobs
) -> None:
    knobs.steerings = [{**HAPPY, "default": None, "file_default": None, "min": None, "max": None, "description": ""}]
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator(".card")).to_contain_text("No safe range was measured")
    page.locator("#dial-0-range").focus()
    page.keyboard.press("ArrowRight")
    assert float(page.get_by_label("happy, number").input_value()) > 0
    expect(page.get_by_role("switch", name="happy, on")).to_be_checked()


# --- the conversation --------------------------------------------------------------------------------------------


def test_comparing_asks_twice_at_one_seed_and_the_dial_moves_the_steered_one(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    page.get_by_role("switch", name="Compare").check()
    ask(page, "Hello")
    texts = page.locator(f"{ANSWER} .text")
    expect(texts.nth(0)).to_contain_text("happy4.1")
    expect(texts.nth(1)).to_contain_text("plain")
    turn(page, "happy", -3)
    expect(texts.nth(0)).to_contain_text("happy-3")
    stop(page)
    assert "happy" not in texts.nth(1).inner_text()
    both = sorted(knobs.requests, key=lambda request: request["steering"]["happy"] is None)
    assert both[1]["steering"] == {"happy": None, "formal": None}
    assert both[0]["seed"] == both[1]["seed"]
    assert both[0]["messages"] == both[1]["messages"]


def test_a_conversation_goes_on_from_the_answer_that_was_chosen(page: Page, knobs: Knobs) -> None:
    knobs.words = 3
    page.get_by_role("switch", name="Compare").check()
    answered(page)
    page.get_by_role("button", name="Go on from this one").click()
    page.get_by_role("switch", name="Compare").uncheck()
    answered(page, "And then?")
    assert knobs.requests[-1]["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "plain plain plain"},
        {"role": "user", "content": "And then?"},
    ]


def test_regenerating_keeps_the_version_before(page: Page, knobs: Knobs) -> None:
    knobs.words = 2
    answered(page)
    turn(page, "happy", -3)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".text")).to_have_text("happy-3 happy-3")
    expect(page.locator(".versions")).to_contain_text("2 / 2")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".text")).to_have_text("happy4.1 happy4.1")


def test_system_prompt_and_sampling_go_with_the_request(page: Page, knobs: Knobs) -> None:
    page.get_by_text("System prompt").first.click()
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    page.get_by_text("Sampling").click()
    wanted = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repeat_penalty": 1.2, "max_tokens": 99, "seed": 7,
    }  # fmt: skip
    for name, value in wanted.items():
        page.locator(f"#sampling-{name}").fill(str(value))
    page.locator("#sampling-top_p").fill("3")  # refused where it stands: the number before it holds
    expect(page.get_by_text("A number from 0 to 1")).to_be_visible()
    answered(page)
    request = knobs.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: request[name] for name in wanted} == wanted


def test_conversation_dials_and_settings_survive_a_reload(page: Page, knobs: Knobs) -> None:
    knobs.words = 2
    turn(page, "happy", -3)
    page.get_by_role("switch", name="Compare").check()
    answered(page)
    page.reload()
    expect(page.locator(f"{ANSWER} .text")).to_have_text(["happy-3 happy-3", "plain plain"])
    expect(page.get_by_label("happy, number")).to_have_value("-3")
    expect(page.get_by_role("switch", name="Compare")).to_be_checked()


def test_an_answer_cut_by_a_reload_keeps_its_words_and_says_so(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    ask(page, "Hello")
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    page.reload()
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    expect(page.get_by_role("alert")).to_contain_text("reloaded")


def test_the_export_holds_texts_dials_and_where_they_moved(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    ask(page, "Hello")
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    turn(page, "happy", -3)
    expect(page.locator(".text")).to_contain_text("happy-3 happy-3")
    stop(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename.endswith(".json")
    whole = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    (answer,) = whole["turns"][0]["versions"][0]
    assert answer["steering"] == {"happy": 4.1, "formal": None}
    (move,) = answer["moves"]
    assert move["steering"] == {"happy": -3, "formal": None}
    assert set(answer["text"][: move["at"]].split()) == {"happy4.1"}
    assert set(answer["text"][move["at"] :].split()) == {"happy-3"}
    assert answer["sampling"]["seed"] == knobs.requests[0]["seed"]
    assert whole["messages"][-1] == {"role": "assistant", "content": answer["text"]}


def test_copy_gives_the_text_alone(page: Page, context: BrowserContext, knobs: Knobs) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    knobs.text = "Two **bold** words"
    answered(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Two **bold** words"


def test_a_new_conversation_can_be_undone(page: Page, knobs: Knobs) -> None:
    knobs.words = 2
    answered(page)
    page.get_by_role("button", name="New").click()
    expect(page.locator(ANSWER)).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(ANSWER)).to_have_count(1)


def test_a_prompt_that_got_no_answer_is_not_sent_again(page: Page, knobs: Knobs) -> None:
    knobs.words, knobs.break_after = 2, 0
    expect(answered(page, "One").get_by_role("alert")).to_be_visible()
    knobs.break_after = None
    answered(page, "Two")
    assert knobs.requests[-1]["messages"] == [{"role": "user", "content": "Two"}]


def test_past_a_full_context_the_oldest_turns_are_left_out_and_it_is_told(page: Page, knobs: Knobs) -> None:
    knobs.words = 1
    page.get_by_text("System prompt").first.click()
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    for prompt in ("One", "Two"):
        answered(page, prompt)
    knobs.most_messages = 2
    expect(answered(page, "Three")).to_contain_text("the 2 oldest turns left out: the context is full")
    assert [each["content"] for each in knobs.requests[-1]["messages"]] == ["Be brief.", "Three"]


def test_other_steerings_after_a_quick_restart_are_found_by_the_first_refusal(page: Page, knobs: Knobs) -> None:
    knobs.steerings = [{**HAPPY, "name": "sunny"}]
    ask(page, "Hello")
    expect(page.locator(".card")).to_have_count(1)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".text")).to_contain_text("sunny4.1")


# --- reading -------------------------------------------------------------------------------------------------------


def test_words_are_coloured_by_what_was_read_of_them(page: Page, knobs: Knobs) -> None:
    knobs.text = "gloom then *cheer* again gloom"
    expect(page.locator(".read-button")).to_have_count(1)  # the other steering has no class means
    answered(page)
    button = page.get_by_role("button", name="Colour words by happy")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    answer = answered(page)
    assert [request.get("read", False) for request in knobs.requests] == [False, True]
    words = answer.locator(".read")
    expect(words).to_have_text(["gloom", "then", "cheer", "again", "gloom"])
    tones = [each.get_attribute("data-tone") for each in words.all()]
    assert tones == ["cool", "none", "warm", "cool", "none"]
    assert words.first.get_attribute("title") == "happy −1.2"
    expect(answer.locator("em .read")).to_have_text("cheer")
    expect(answer.locator(".facts")).to_contain_text("reads happy −0.26")
    page.reload()
    expect(page.locator(".read")).to_have_count(5)
    button.click()
    expect(page.locator(".read")).to_have_count(0)
    expect(page.locator(".facts").last).not_to_contain_text("reads")


def test_coloured_words_keep_the_marks_of_a_dial_that_moved(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    page.get_by_role("button", name="Colour words by happy").click()
    ask(page, "Hello")
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    turn(page, "happy", -2)
    expect(page.locator(".text")).to_contain_text("happy-2")
    stop(page)
    expect(page.locator(".moved")).to_contain_text("−2°")
    expect(page.locator(".said")).to_have_count(0)


# --- the text is not trusted ---------------------------------------------------------------------------------------


def test_markdown_is_shown_and_html_is_text(page: Page, knobs: Knobs) -> None:
    knobs.text = (
        "**bold** <img src=x onerror=alert(1)> <script>alert(2)</script> [bad](javascript:alert(3)) "
        "![picture](http://127.0.0.1:9/x.png) [good](https://example.org)\n\n<div onclick=alert(4)>block</div>"
    )
    text = answered(page).locator(".text")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("img, script, div, [onclick], [onerror]")).to_have_count(0)
    expect(text).to_contain_text("<script>alert(2)</script>")
    assert [link.get_attribute("href") for link in text.locator("a").all()] == [None, "https://example.org"]
    assert (text.locator("a").last.get_attribute("rel") or "").split() == ["noopener", "noreferrer", "nofollow"]


MARKED = "One.\n\n- item *two*\n- [a link](https://example.org/path)\n\n```py\ncode\n```\n\n1. first **bold** 中文"


def test_a_move_within_markdown_stands_behind_what_was_said_and_breaks_nothing(page: Page) -> None:
    before = page.evaluate(
        """async (source) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const shape = (moves) => {
            const root = document.createElement("div");
            renderMarkdown(root, source, moves, 0);
            const chip = root.querySelector(".moved");
            const range = document.createRange();
            range.setStart(root, 0);
            if (chip) range.setEndBefore(chip);
            const said = range.toString();
            chip?.remove();
            root.querySelectorAll(".said").forEach((each) => each.replaceWith(...each.childNodes));
            root.normalize();
            return [said, root.innerHTML];
          };
          const [, whole] = shape([]);
          return [...Array(source.length + 1).keys()].map((at) => {
            const [said, html] = shape([{ at, label: "−3°", tone: -1 }]);
            if (html !== whole) throw new Error(`broken at ${at}: ${html}`);
            return said.replace(/\\s+/g, " ").trim();
          });
        }""",
        MARKED,
    )
    for said_so_far, wanted in {
        "": "", "On": "On", "One.": "One.", "\n\n- ": "One.", "item ": "One. item", "*tw": "One. item tw",
        "- [a l": "One. item two a l", "cod": "One. item two a link cod", "1. fi": "One. item two a link code fi",
        "**bol": "One. item two a link code first bol", "中": "One. item two a link code first bold 中",
    }.items():  # fmt: skip
        at = MARKED.index(said_so_far) + len(said_so_far)
        assert before[at] == wanted, MARKED[:at]


def test_nothing_in_the_page_is_inline_or_of_another_host() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "<style" not in html
    assert "style=" not in html
    assert html.count("<script") == html.count("<script src=") + html.count('<script type="module" src=')
    for path in [*PAGE.glob("*.js"), *PAGE.glob("*.css"), PAGE / "index.html"]:
        text = path.read_text(encoding="utf-8")
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "").replace(":\\/\\/", ""), path
        assert "innerHTML" not in text, path
        assert len(text.splitlines()) <= 250, path


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_server_that_is_gone_is_told_and_found_again(page: Page, server: FakeServer, knobs: Knobs) -> None:
    knobs.words = LONG
    ask(page, "Hello")
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    server.kill()
    try:
        expect(page.get_by_text("The server cannot be reached")).to_be_visible()
        expect(page.get_by_role("alert")).to_contain_text("broke off")
        expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    finally:
        server.start()
    expect(page.get_by_text("The server cannot be reached")).to_be_hidden()
    expect(page.get_by_text("The server is back.")).to_be_visible()
    knobs.words = 3
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".text")).to_have_text("happy4.1 happy4.1 happy4.1")


def test_a_model_that_is_loading_is_waited_for(page: Page, knobs: Knobs) -> None:
    knobs.loading = True
    page.reload()
    expect(page.get_by_text("The model is loading")).to_be_visible()
    knobs.loading = False
    expect(page.get_by_text("The model is loading")).to_be_hidden()


def test_the_server_itself_shows_the_page_while_the_model_loads() -> None:
    from starlette.testclient import TestClient

    from edge_steer.serve.app import Loading

    client = TestClient(Loading())
    assert client.get("/health").status_code == 503
    index = client.get("/")
    assert index.headers["content-security-policy"].startswith("default-src 'self'")
    for path in ["page/app.js", "page/vendor/marked.js"]:
        found = client.get(f"/{path}")
        assert found.headers["content-type"].startswith("text/javascript")
        assert found.headers["cache-control"] == "no-cache"


def test_a_full_queue_is_told_and_tried_again(page: Page, knobs: Knobs) -> None:
    knobs.full, knobs.words = 1, 2
    ask(page, "Hello")
    expect(page.get_by_text("The queue is full. Trying again in 1 s.")).to_be_visible()
    expect(page.locator(".text")).to_have_text("happy4.1 happy4.1")


def test_waiting_for_the_queue_can_be_stopped(page: Page, knobs: Knobs) -> None:
    knobs.full = 50
    ask(page, "Hello")
    expect(page.get_by_text("Trying again in")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(ANSWER)).to_contain_text("Stopped")
    assert not knobs.requests


def test_a_key_is_asked_for_until_it_fits_and_kept_for_the_tab(page: Page, knobs: Knobs) -> None:
    knobs.key, knobs.words = "right", 2
    page.reload()
    for key in ("wrong", "right"):
        expect(page.get_by_role("dialog")).to_contain_text("refused" if key == "right" else "--api-key")
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(answered(page).locator(".text")).to_have_text("happy4.1 happy4.1")
    page.reload()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(".banner")).to_be_hidden()
    assert page.evaluate("Object.values(localStorage).includes('right')") is False


def test_a_key_that_is_wanted_of_a_sudden_is_asked_for_and_the_prompt_not_lost(page: Page, knobs: Knobs) -> None:
    knobs.key, knobs.words = "right", 2
    ask(page, "Hello")
    page.get_by_label("Key", exact=True).fill("right")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator(".text")).to_have_text("happy4.1 happy4.1")


def test_an_error_within_a_stream_stands_under_the_words_before_it(page: Page, knobs: Knobs) -> None:
    knobs.break_after = 2
    answer = answered(page)
    expect(answer.locator(".text")).to_have_text("happy4.1 happy4.1")
    expect(answer.get_by_role("alert")).to_contain_text("The device ran out of memory")


# --- keyboard, screen reader, small screens ------------------------------------------------------------------------


def test_everything_can_be_done_from_the_keyboard(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the message field
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".text")).to_contain_text("happy4.1 happy4.1")
    assert knobs.requests[0]["messages"] == [{"role": "user", "content": "One\ntwo"}]
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "range":
            break
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    there = float(page.get_by_label("happy, number").input_value())
    assert there < 4.1
    expect(page.locator(".text")).to_contain_text(f"happy{there:g}")
    page.keyboard.press("Escape")
    expect(page.locator(ANSWER)).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_screen_reader_hears_each_sentence_once_and_the_dial_in_words(page: Page, knobs: Knobs) -> None:
    knobs.text = "First sentence. Second sentence. Third"
    answered(page)
    expect(page.locator("#announcer p")).to_have_text(["First sentence.", "Second sentence.", "Third"])
    expect(page.locator("#announcer")).to_have_attribute("aria-live", "polite")
    slider = page.get_by_role("slider", name="happy, gloomy to cheerful")
    expect(slider).to_have_attribute("aria-valuetext", "4.1 degrees, cheerful")
    turn(page, "happy", -9)
    expect(slider).to_have_attribute("aria-valuetext", "-9 degrees, gloomy, beyond the safe range")


def test_a_narrow_phone_has_its_dials_in_a_drawer(page: Page, knobs: Knobs) -> None:
    knobs.words = LONG
    page.set_viewport_size({"width": 360, "height": 640})
    expect(page.locator("#panel")).to_be_hidden()
    ask(page, "Hello")
    page.get_by_role("button", name="Dials").click()
    slider = page.get_by_role("slider", name="happy")
    expect(slider).to_be_focused()
    expect(slider).to_be_in_viewport()
    page.keyboard.press("Home")
    expect(page.locator(".text")).to_contain_text("happy-13")
    box = "(selector) => document.querySelector(selector).getBoundingClientRect()"
    words, drawer = page.evaluate(f"['.foot', '#panel'].map({box})")
    assert words["bottom"] <= drawer["top"], "the newest words are in sight above the drawer"
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.keyboard.press("Escape")  # stops
    page.keyboard.press("Escape")  # closes
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.get_by_role("button", name="Dials")).to_be_focused()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious(page: Page, knobs: Knobs, theme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[dev]'").Axe()
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.get_by_text("System prompt").first.click()
    page.get_by_text("Sampling").click()
    knobs.words = LONG
    page.get_by_role("switch", name="Compare").check()
    ask(page, "Hello")
    expect(page.locator(".text").first).to_contain_text("happy4.1 happy4.1")
    turn(page, "happy", -9)
    expect(page.locator(".moved")).to_be_visible()
    stop(page)
    knobs.break_after = 2
    answered(page)
    page.set_viewport_size({"width": width, "height": 740})
    if width == 360:
        page.get_by_role("button", name="Dials").click()
    found = axe.run(page).response["violations"]
    bad = [(each["id"], each["nodes"][0]["html"][:200]) for each in found if each["impact"] in ("serious", "critical")]
    assert bad == []


def test_the_theme_button_overrides_the_system_and_is_remembered(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.get_by_role("button", name="Theme: auto").click()
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(ground) != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(ground) != light
