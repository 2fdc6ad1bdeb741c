"""The page of `serve` in a real browser: type, stream, compare, vote, by keyboard and on a phone.

QLORA_DPO_SCREENSHOTS names a folder for pictures to look at.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import Served, dictating, served

from qlora_dpo.talk.sampling import SamplingParams

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the browser extra")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1100,800",
    ):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as somebody uses it."""

    def __init__(self, browser: Any, server: Served) -> None:
        self.browser, self.server = browser, server
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(server.url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.refresh()

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Of all that match, read at one moment: the page replaces what it shows."""
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
        return list(self.browser.execute_script(script, selector))

    def until(self, true: Any, seconds: float = 30) -> Any:
        return WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: true())

    def ask(self, text: str, answers: int = 2) -> list[str]:
        """Type a question, send it with Enter, and wait for the answers to it."""
        self.until(lambda: self.texts("#voices label"))
        before = len(self.texts("article"))
        self.one("#text").send_keys(text, Keys.ENTER)
        self.until(lambda: len(self.texts("article")) == before + answers)
        self.until(lambda: self.one("#send").is_displayed())
        assert not self.browser.find_elements(By.CSS_SELECTOR, 'article[aria-busy="true"]')
        return self.texts("article .said")[before:]

    def settings(self, **values: str) -> None:
        self.one("#open-settings").click()
        for name, value in values.items():
            field = self.one(f"#{name}")
            field.clear()
            field.send_keys(value)
        self.one("#settings .main").click()

    def picture(self, name: str) -> None:
        if folder := os.environ.get("QLORA_DPO_SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))

    def complaints(self) -> list[str]:
        """What the browser has logged, such as text that its content security policy stopped."""
        return [each["message"] for each in self.browser.get_log("browser")]


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def page(browser: Any, votes: Path) -> Iterator[Page]:
    with served(collect=votes) as server:
        yield Page(browser, server)


def greedy(server: Served, model: str, *turns: str) -> str:
    roles = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    status, answer = server.ask("POST", "/v1/chat/completions", {"model": model, "messages": roles})
    assert status == 200
    return str(answer["choices"][0]["message"]["content"])


def test_both_models_answer_side_by_side_and_the_vote_becomes_a_pair(page: Page, votes: Path) -> None:
    said = page.ask("rice?")
    assert said == [greedy(page.server, "tuned", "rice?"), greedy(page.server, "plain", "rice?")]
    assert page.texts("article h3") == ["tuned", "plain"]
    assert page.texts(".question") == ["rice?"]
    boxes = [each.rect for each in page.browser.find_elements(By.CSS_SELECTOR, "article")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    assert page.texts("article footer span")[0].startswith("16 tokens · ")
    page.browser.find_elements(By.CSS_SELECTOR, "button.vote")[1].click()
    page.until(lambda: page.texts("button.vote") == ["This one is better", "Voted better"])
    assert [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()] == [
        {
            "prompt": [{"role": "user", "content": "rice?"}],
            "chosen": [{"role": "assistant", "content": said[1].strip()}],
            "rejected": [{"role": "assistant", "content": said[0].strip()}],
            "chosen_by": "plain",
            "rejected_by": "tuned",
        }
    ]
    # the conversation goes on from the answer that was voted for
    assert page.ask("Thank you") == [greedy(page.server, name, "rice?", said[1], "Thank you") for name in MODELS]
    assert page.complaints() == []


MODELS = ("tuned", "plain")


def test_one_model_alone_answers_and_history_brings_a_conversation_back(page: Page) -> None:
    page.until(lambda: page.texts("#voices label"))
    page.one('input[value="plain"]').click()
    said = page.ask("rice?", answers=1)
    assert said == [greedy(page.server, "plain", "rice?")]
    page.one("#new").click()
    assert (page.texts("article"), page.one("#empty").is_displayed()) == ([], True)
    page.browser.refresh()
    page.until(lambda: page.texts("#voices label"))
    assert page.one('input[value="plain"]').is_selected()
    page.one("#open-history").click()
    assert page.texts("#kept li button:first-child") == ["rice?"]
    page.one("#kept li button").click()
    assert page.texts("article .said") == said
    page.one("#open-history").click()
    page.one("#forget").click()
    assert page.texts("#kept li") == ["Nothing yet."]


def test_settings_reach_the_model(page: Page) -> None:
    page.settings(system="You are a cat.", max_tokens="4")
    said = page.ask("rice?")
    turns = [{"role": "system", "content": "You are a cat."}, {"role": "user", "content": "rice?"}]
    asked = {"model": "tuned", "messages": turns, "max_tokens": 4}
    status, answer = page.server.ask("POST", "/v1/chat/completions", asked)
    assert (status, said[0]) == (200, answer["choices"][0]["message"]["content"])
    assert page.texts("article footer span")[0].endswith(" · cut at the limit")


def test_names_are_hidden_until_the_vote(page: Page) -> None:
    page.one("#open-settings").click()
    page.one("#blind").click()
    page.one("#settings .main").click()
    page.ask("rice?")
    assert page.texts("article h3") == ["answer A", "answer B"]
    page.one("button.vote").click()
    page.until(lambda: sorted(page.texts("article h3")) == ["plain", "tuned"])


def test_the_page_is_usable_by_keyboard_alone(page: Page, votes: Path) -> None:
    page.until(lambda: page.texts("#voices label"))
    keys = webdriver.ActionChains(page.browser)
    assert page.browser.switch_to.active_element.get_attribute("id") == "text"
    keys.send_keys("ri").key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT)
    keys.send_keys("ce", Keys.ENTER).perform()
    page.until(lambda: len(page.texts("button.vote")) == 2)
    assert page.texts(".question") == ["ri\nce"]
    keys = webdriver.ActionChains(page.browser)
    keys.key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    focused = page.browser.switch_to.active_element
    assert focused.get_attribute("aria-label") == "This one is better: plain"
    focused.send_keys(Keys.SPACE)
    page.until(votes.exists)
    assert json.loads(votes.read_text(encoding="utf-8"))["chosen_by"] == "plain"


def test_escape_stops_an_answer_and_keeps_what_was_said(browser: Any) -> None:
    with served(SamplingParams(temperature=0, max_new_tokens=900, seed=0)) as server:
        page = Page(browser, server)
        page.until(lambda: page.texts("#voices label"))
        page.one("#text").send_keys("rice?", Keys.ENTER)
        page.until(lambda: page.texts("article .said") and page.texts("article .said")[0])
        webdriver.ActionChains(browser).send_keys(Keys.ESCAPE).perform()
        page.until(lambda: page.one("#send").is_displayed())
        assert page.texts("article footer span")[0] == "stopped"
        assert page.texts("button.vote") == []  # votes are not collected here
        assert page.texts("article .said")[0]


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m<style>*{display:none}</style>"


def test_text_of_a_model_is_text(browser: Any) -> None:
    with served(SamplingParams(temperature=0, max_new_tokens=200, seed=0), model=dictating(HOSTILE)) as server:
        server.service.models = {"tuned": "model"}
        page = Page(browser, server)
        said = page.ask("<b>rice?</b>", answers=1)
        assert said == [HOSTILE.replace("\x1b[31m", "")]
        assert page.texts(".question") == ["<b>rice?</b>"]
        assert browser.find_elements(By.CSS_SELECTOR, "article img, article script, article style, .question b") == []
        assert page.complaints() == []


def test_a_key_is_asked_for(browser: Any, votes: Path) -> None:
    with served(key="0123456789abcdef", collect=votes) as server:
        page = Page(browser, server)
        page.until(lambda: page.one("#settings").is_displayed())
        assert browser.switch_to.active_element.get_attribute("id") == "key"
        page.one("#key").send_keys("0123456789abcdef", Keys.ENTER)
        assert len(page.ask("rice?")) == 2


def test_a_refusal_of_the_server_is_shown_and_the_question_given_back(page: Page) -> None:
    page.until(lambda: page.texts("#voices label"))
    page.browser.execute_script("arguments[0].value = 'rice '.repeat(900)", page.one("#text"))
    page.one("#send").click()
    page.until(lambda: "send less" in page.one("#told").text)
    assert page.one("#text").get_property("value") == ("rice " * 900).strip()
    assert page.texts("article") == []


def test_nothing_is_asked_of_any_other_server(page: Page) -> None:
    page.ask("rice?")
    asked = [json.loads(each["message"])["message"] for each in page.browser.get_log("performance")]
    urls = {each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"}
    assert len(urls) >= 4
    assert {url for url in urls if not url.startswith(f"{page.server.url}/")} == set()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1100, 800)], ids=["phone", "desk"])
def test_everything_fits_a_phone_and_a_desk_in_light_and_dark(page: Page, theme: str, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    look = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
    name = f"{theme}-{'phone' if width < 500 else 'desk'}"
    try:
        page.browser.refresh()
        page.until(lambda: page.texts("#voices label"))
        page.picture(f"{name}-empty")
        page.ask("How do I find the library, and when does it open?")
        page.ask("Thank you " * 12)
        page.browser.find_elements(By.CSS_SELECTOR, "button.vote")[2].click()
        page.until(lambda: "Voted better" in page.texts("button.vote"))
        page.picture(name)
        wide, tall = page.browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert (wide, tall) == (width, height)
        for button in page.browser.find_elements(By.CSS_SELECTOR, "header button, #send, button.vote"):
            assert button.rect["height"] >= 40
        assert page.browser.execute_script(CONTRAST) >= 4.5
        page.one("#open-settings").click()
        page.picture(f"{name}-settings")
        assert page.browser.execute_script(CONTRAST) >= 4.5
        page.one("#settings .main").click()
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# The least contrast of visible text with what is behind it, as WCAG 2 measures it
CONTRAST = """
const part = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const light = (rgb) => 0.2126 * part(rgb[0]) + 0.7152 * part(rgb[1]) + 0.0722 * part(rgb[2]);
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = numbers(getComputedStyle(element).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
const all = document.querySelectorAll("h1, h2, h3, p, span, label, small, button, .said, input, textarea");
const shown = [...all].filter(
  (each) => each.checkVisibility() && each.textContent.trim() && !each.disabled && !each.classList.contains("unseen"));
return Math.min(...shown.map((each) => {
  const [one, other] = [light(numbers(getComputedStyle(each).color)), light(behind(each))].sort((a, b) => b - a);
  return (one + 0.05) / (other + 0.05);
}));
"""
