"""The page at `/`, in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from video_client import TOKEN, until

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)",
)
OPTIONS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1100,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """What somebody does with it."""

    def __init__(self, browser: WebDriver) -> None:
        self.browser = browser

    def at(self, name: str):
        return self.browser.find_element(By.ID, name)

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            element = self.at(name)
            if element.get_attribute("type") != "file":
                element.clear()
            element.send_keys(str(value))

    def is_shown(self, name: str) -> bool:
        return self.at(name).is_displayed()

    def errors(self) -> list[str]:
        """Of scripts and of the page's own policy; refusals that a test provokes are none."""
        lines = [line["message"] for line in self.browser.get_log("browser")]
        return [line for line in lines if "status of" not in line]


@pytest.fixture
def page(server, browser) -> Page:
    browser.get("about:blank")
    browser.get(server.url)
    browser.execute_script("sessionStorage.clear()")
    browser.get(server.url)
    return Page(browser)


@pytest.fixture
def known(page) -> Page:
    """With the token."""
    page.browser.execute_script("sessionStorage.setItem('token', arguments[0])", TOKEN)
    page.browser.refresh()
    return page


def test_from_a_prompt_to_a_video_that_plays(page, server, face, voice, tmp_path):
    page.fill(prompt='A woman says: "Hello!" <b>', seconds=0.36, size="64x96", seed=7)
    page.fill(image=face, voice=voice)
    assert page.is_shown("face") and page.is_shown("listen")
    until(lambda: page.browser.execute_script("return document.images[0].naturalWidth") == 64)
    page.at("make").click()
    until(lambda: page.is_shown("token-row"))  # the server wants one
    assert "Bearer TOKEN" in page.at("refused").text
    page.fill(token=TOKEN)
    page.at("make").click()
    until(lambda: page.is_shown("progress"))
    until(lambda: page.is_shown("done"))
    assert not page.is_shown("refused") and not page.is_shown("failed")
    assert page.at("status").text == "completed"
    assert page.at("progress").get_attribute("value") == "100"
    video = page.at("video")
    until(lambda: video.get_property("readyState") == 4)  # HAVE_ENOUGH_DATA
    assert (video.get_property("videoWidth"), video.get_property("videoHeight")) == (64, 96)
    assert video.get_property("duration") == pytest.approx(9 / 25, abs=0.05)
    page.browser.execute_script("arguments[0].play()", video)
    until(lambda: video.get_property("ended"))
    name = page.browser.current_url.rpartition("#")[2]
    video = server.get(name)
    assert video["prompt"] == 'A woman says: "Hello!" <b>' and video["seed"] == 7
    rows = page.at("bars").text.splitlines()
    assert dict(zip(rows[::2], rows[1::2], strict=True)) == {
        stage: f"{seconds:.3f}" for stage, seconds in video["timings_s"].items()
    }
    widths = {
        stage: page.browser.execute_script("return arguments[0].offsetWidth", bar)
        for stage, bar in zip(
            rows[::2], page.at("bars").find_elements(By.TAG_NAME, "i"), strict=True
        )
    }
    assert max(widths, key=widths.get) == max(video["timings_s"], key=video["timings_s"].get)
    page.browser.save_screenshot(str(tmp_path / "page.png"))
    assert page.errors() == []


def test_a_reload_finds_the_video_again(known, server):
    name = server.create()
    server.when(name, "completed")
    known.browser.get(f"{server.url}/#{name}")
    known.browser.refresh()
    until(lambda: known.is_shown("done"))
    known.at("remove").click()
    until(lambda: not known.is_shown("job"))
    until(lambda: server.http.get(f"/v1/videos/{name}").status_code == 404)
    assert known.errors() == []


def test_cancelling(known, server):
    known.fill(prompt="hi", seconds=2, size="256x256")
    known.at("make").click()
    until(lambda: known.is_shown("progress") and "in progress" in known.at("status").text)
    name = known.browser.current_url.rpartition("#")[2]
    assert known.at("remove").text == "Cancel"
    known.at("remove").click()
    until(lambda: server.http.get(f"/v1/videos/{name}").status_code == 404)
    assert not known.is_shown("job") and known.errors() == []


def test_refusals_are_shown(known, tmp_path):
    (tmp_path / "face.png").write_text("no image")
    known.fill(prompt="hi", seconds=1, size="64x64", image=tmp_path / "face.png")
    known.at("make").click()
    until(lambda: known.is_shown("refused"))
    assert "must be in one of the formats PNG, JPEG, WEBP" in known.at("refused").text
    known.browser.execute_script("document.getElementById('form').noValidate = true")
    known.fill(size="9999x9999")
    known.at("make").click()
    until(lambda: "size" in known.at("refused").text)


def test_a_video_that_is_not_there(known, server):
    known.browser.get(f"{server.url}/#video_{'0' * 32}")
    known.browser.refresh()
    until(lambda: "no longer on the server" in known.at("refused").text)
    assert not known.is_shown("job")


def test_it_asks_nobody_else(server, page):
    asked = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert all(name.startswith((server.url, "data:")) for name in asked)
    assert httpx.get(server.url).headers["content-security-policy"].startswith("default-src 'none'")
