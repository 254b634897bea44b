"""The page at `/`, in headless Chromium."""

from __future__ import annotations

import httpx
import pytest
from browsing import Page, needs_browser
from selenium.webdriver.common.by import By
from video_client import TOKEN, until

pytestmark = needs_browser


@pytest.fixture
def page(server, browser) -> Page:
    return Page(browser, server.url)


@pytest.fixture
def known(server, browser) -> Page:
    """With the token."""
    return Page(browser, server.url, TOKEN)


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
    # The finished mp4 may take the place of what plays, which interrupts a play() of the live one.
    page.browser.execute_script("arguments[0].play().catch(() => null)", video)
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
    known.browser.get("about:blank")
    known.browser.get(f"{server.url}/#video_{'0' * 32}")
    until(lambda: "no longer on the server" in known.at("refused").text)
    assert not known.is_shown("job")


def test_it_asks_nobody_else(server, page):
    asked = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert all(name.startswith((server.url, "data:")) for name in asked)
    assert httpx.get(server.url).headers["content-security-policy"].startswith("default-src 'none'")
