"""What the page does while a video is made, and before and after, in Chromium and one process."""

from __future__ import annotations

import base64
import itertools
from importlib import resources

import pytest
from browsing import Page, needs_browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from video_client import LONG, SMALL, TOKEN, TOKEN_SHA256, until

from magihuman.runtime.serving.settings import Settings

pytestmark = needs_browser

FIRST, FRAMES = 25, 73  # of a clip of 3 s, in its first window and in all
PROMPTS = ("A woman waves.", 'A man says: "Hello!" <b>')


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256, prompts=PROMPTS)


@pytest.fixture
def page(local, browser):
    opened = Page(browser, local.url, TOKEN)
    opened.fill(prompt="hi", seconds=0.2, size="32x32")
    opened.run("document.getElementById('num_inference_steps').value = 1")
    yield opened
    assert opened.errors() == []
    browser.get("about:blank")  # it asks for nothing more


def make(page: Page) -> str:
    """Ask for a video, and return its id."""
    before = page.browser.current_url
    page.at("make").click()
    until(lambda: page.browser.current_url != before or page.is_shown("refused"))
    assert not page.is_shown("refused"), page.at("refused").text
    return page.video_name()


def finished(page: Page) -> str:
    name = make(page)
    until(lambda: page.is_shown("done"))
    return name


def history(page: Page) -> list:
    return page.at("history").find_elements(By.TAG_NAME, "li")


# -- while it is made -------------------------------------------------------------------------


def test_it_plays_while_the_video_is_made(page, local, held):
    """The second window waits until the first is being played."""
    page.fill(seconds=3)
    name = make(page)
    video = page.at("video")
    until(lambda: video.get_property("currentTime") > 0)
    assert held.decoded == 1 and local.get(name)["status"] == "in_progress"
    assert "in progress - decoding frames" in page.at("status").text
    assert f"frame {FIRST} of {FRAMES}" in page.at("left").text
    assert not page.is_shown("done")
    live = video.get_property("src")
    held.let.release(2)
    until(lambda: page.is_shown("done"))
    until(lambda: video.get_property("ended"))
    assert video.get_property("duration") == pytest.approx(FRAMES / 25, abs=0.1)
    assert video.get_property("src") == live  # it played on, and did not begin again
    page.run("arguments[0].play().catch(() => null)", video)
    until(lambda: video.get_property("src") not in ("", live))
    until(lambda: video.get_property("ended"))  # of the finished one


def test_a_video_that_is_left_is_played_no_more(page, local, held):
    page.fill(seconds=3)
    name = make(page)
    until(lambda: page.at("video").get_property("currentTime") > 0)
    page.at("remove").click()
    until(lambda: not page.is_shown("job"))
    assert not page.at("video").get_property("src")
    until(lambda: local.http.get(f"/v1/videos/{name}").status_code == 404)
    held.let.release(3)


def test_the_place_in_line_is_told(page, local):
    running = [local.create(LONG) for _ in range(2)]
    for name in running:
        local.when(name, "in_progress")
    first = local.create(SMALL)
    name = make(page)
    until(lambda: "number 2 in line" in page.at("left").text)
    local.delete(first)
    until(lambda: "next in line" in page.at("left").text)
    for each in running:
        local.delete(each)
    until(lambda: page.is_shown("done"))
    assert local.get(name)["status"] == "completed" and not page.is_shown("left")


def test_a_failure_is_told(page, replica, monkeypatch):
    def fail(latent):
        raise MemoryError

    monkeypatch.setattr(replica._engine._parts.turbo_vae, "windows", fail)
    make(page)
    until(lambda: page.is_shown("failed"))
    assert page.at("status").text == "failed" and page.at("failed").text


# -- the form ---------------------------------------------------------------------------------


def test_what_is_asked_for_is_what_the_form_says(page, local):
    examples = Select(page.at("examples"))
    assert [option.text for option in examples.options[1:]] == list(PROMPTS)
    examples.select_by_index(2)
    assert page.value("prompt") == PROMPTS[1] and page.value("examples") == ""
    seeds = {page.value("seed")}
    for _ in range(2):
        page.at("random").click()
        seeds.add(page.value("seed"))
    assert len(seeds) == 3
    page.at("more").find_element(By.TAG_NAME, "summary").click()
    page.fill(num_inference_steps=2)
    assert not page.is_shown("guidance_scale")  # this model takes none
    before = page.browser.current_url
    page.at("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: page.browser.current_url != before)
    job = local.jobs[0].get(page.video_name())
    assert job.prompt == PROMPTS[1]
    assert job.options == {
        "seconds": 0.2, "width": 32, "height": 32, "steps": 2, "seed": int(page.value("seed")),
    }  # fmt: skip
    until(lambda: page.is_shown("done"))
    assert page.at("asked").text == PROMPTS[1]


DROP = """
const [base64, name, type] = arguments;
const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], name, { type }));
const options = { dataTransfer, bubbles: true, cancelable: true };
document.body.dispatchEvent(new DragEvent("dragover", options));
const wasMarked = document.body.classList.contains("dragging");
document.body.dispatchEvent(new DragEvent("drop", options));
return wasMarked && !document.body.classList.contains("dragging");
"""


def test_files_are_dropped_and_cleared(page, face, voice):
    for path, kind in ((face, "image/png"), (voice, "audio/wav"), (face, "text/plain")):
        content = base64.b64encode(path.read_bytes()).decode()
        assert page.run(DROP, content, path.name, kind)
        assert page.is_shown("refused") == (kind == "text/plain")
    until(lambda: page.run("return document.images[0].naturalWidth") == 64)
    assert page.is_shown("listen")
    page.at("image-clear").click()
    assert not page.is_shown("face") and page.run(
        "return document.getElementById('image').files.length === 0"
    )
    finished(page)
    assert not page.is_shown("refused")


def test_a_voice_is_recorded(page, local):
    page.at("record").click()
    until(lambda: page.at("record").text == "Stop recording")
    page.browser.execute_async_script("setTimeout(arguments[0], 500)")  # something to be heard
    page.at("record").click()
    until(lambda: page.is_shown("listen"))
    assert page.at("record").text == "Record"
    name = finished(page)
    assert "audio" in local.get(name)["timings_s"]


# -- the history ------------------------------------------------------------------------------


def test_the_history_is_kept_and_picked_up(page, local):
    names = [finished(page)]
    page.fill(prompt="ho", seed=7)
    names.append(finished(page))
    page.browser.refresh()
    assert [row.text.splitlines()[:2] for row in history(page)] == [
        ["ho", "0.2 s, 32x32, seed 7, completed"],
        ["hi", "0.2 s, 32x32, seed 42, completed"],
    ]
    history(page)[1].find_element(By.TAG_NAME, "a").click()
    until(lambda: page.is_shown("done") and page.at("asked").text == "hi")
    assert page.video_name() == names[0]
    page.at("again").click()
    until(lambda: len(history(page)) == 3)
    until(lambda: page.is_shown("done") and page.video_name() not in names)
    again = local.get(page.video_name())
    assert again["prompt"] == page.value("prompt") == "hi" and again["seed"] != 42
    local.delete(names[1])
    history(page)[1].find_element(By.TAG_NAME, "a").click()
    until(lambda: "no longer on the server" in page.at("refused").text)
    assert len(history(page)) == 2
    page.at("forget").click()
    assert not page.is_shown("past")
    page.browser.refresh()
    assert history(page) == []


def test_again_needs_the_files_that_were_given(page, face):
    page.fill(image=face)
    finished(page)
    page.at("image-clear").click()
    history(page)[0].find_element(By.TAG_NAME, "button").click()
    until(lambda: len(history(page)) == 2 and page.is_shown("done"))  # it is known yet
    assert page.is_shown("face")
    page.browser.refresh()
    history(page)[0].find_element(By.TAG_NAME, "button").click()
    until(lambda: "choose it again" in page.at("refused").text)
    assert len(history(page)) == 2


# -- everybody can use it -----------------------------------------------------------------------


def ratio(colours: list[str]) -> float:
    """The contrast of two colours, as WCAG has it."""
    lights = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(sum(f * p for f, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    dark, light = sorted(lights)
    return (light + 0.05) / (dark + 0.05)


def test_axe_finds_nothing(page, face, voice):
    """With all that can be shown, in light and dark, wide and on a phone."""
    page.fill(image=face, voice=voice)
    finished(page)
    page.run(resources.files("axe_core_python").joinpath("axe.min.js").read_text())
    page.run(
        "for (const element of document.querySelectorAll('[hidden]')) element.hidden = false;"
        "document.getElementById('more').open = true;"
        "document.getElementById('make').disabled = true;"
        "for (const name of ['refused', 'failed', 'left'])"
        "  document.getElementById(name).textContent = 'Something is said here.';"
        "document.getElementById('warnings').innerHTML = '<li>A warning.</li>';"
    )
    command = page.browser.execute_cdp_cmd
    for scheme, width in itertools.product(("light", "dark"), (1100, 390)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        command("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 3000, "deviceScaleFactor": 1, "mobile": False}
        command("Emulation.setDeviceMetricsOverride", size)
        found = page.browser.execute_async_script("axe.run(document).then(arguments[0])")
        assert [(each["id"], each["nodes"]) for each in found["violations"]] == []
        unsure = [each for each in found["incomplete"] if each["id"] == "color-contrast"]
        assert [node["target"] for each in unsure for node in each["nodes"]] == []
        assert any(each["id"] == "color-contrast" for each in found["passes"])
        border, ground = page.run(
            "return [getComputedStyle(document.getElementById('seed')).borderTopColor,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert ratio([border, ground]) >= 3
        assert page.run("return document.documentElement.scrollWidth") <= width
    command("Emulation.clearDeviceMetricsOverride", {})
    command("Emulation.setEmulatedMedia", {"features": []})
