"""The page of a face that answers, in Chromium: nano speaks while its voice goes on."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from browsing import Page, needs_browser
from PIL import Image
from sounds import write_sine, write_wave
from video_client import TOKEN, TOKEN_SHA256, until

from magihuman.runtime.evaluate.clip_score import found_colours, mouth_opening, named_colours
from magihuman.runtime.media import read_audio
from magihuman.runtime.serving.face import opening
from magihuman.runtime.serving.replica import EngineReplica
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.weights.shipped import NANO_FOLDER

pytestmark = needs_browser

VOICE_S = 240.0  # longer than any machine takes to show the face
SIDE, LEARNT = 64, 160  # of a picture; nano draws heads of the latter alone
PROMPT = "A man with short black hair in a red shirt on a blue background looks into the camera"
OPEN_PX = 3.0  # by which a mouth that speaks opens, of its 12 at most


@pytest.fixture(scope="module")
def nano():
    engine = EngineReplica({"model": "nano", "device": "cpu"}, [])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def heads(nano, tmp_path_factory):
    """The picture of one, which nano has drawn, by the length of its side."""
    folder = tmp_path_factory.mktemp("heads")

    @functools.cache
    def drawn(side: int) -> Path:
        made = nano._engine.generate(PROMPT, seconds=0.2, width=side, height=side)
        path = folder / f"{side}.png"
        Image.fromarray(made.frames[0]).save(path)
        return path

    return drawn


@pytest.fixture
def side() -> int:
    return SIDE


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "nano", token_sha256=TOKEN_SHA256)


@pytest.fixture
def page(settings, nano, heads, side, serve_here, browser, monkeypatch):
    monkeypatch.setattr(opening, "WINDOW_S", 0.64)  # what a busy machine has the time for
    with serve_here(settings, nano) as running:
        opened = Page(browser, running.url + "/live", TOKEN)
        opened.fill(prompt=PROMPT, size=f"{side}x{side}", image=heads(side))
        opened.local = running
        yield opened
        assert opened.errors() == []
        browser.get("about:blank")
        until(lambda: running.jobs[0]._faces == 0)


def seen(page: Page) -> np.ndarray:
    """What the player shows, [height, width, 3]."""
    pixels = page.run(
        "const video = document.getElementById('video');"
        "const canvas = document.createElement('canvas');"
        "canvas.width = video.videoWidth; canvas.height = video.videoHeight;"
        "const context = canvas.getContext('2d'); context.drawImage(video, 0, 0);"
        "return [canvas.width, canvas.height,"
        " ...context.getImageData(0, 0, canvas.width, canvas.height).data]"
    )
    return np.array(pixels[2:], np.uint8).reshape(pixels[1], pixels[0], 4)[..., :3]


def test_it_speaks_while_the_voice_goes_on(page, tmp_path):
    page.fill(voice=write_sine(tmp_path / "long.wav", seconds=VOICE_S))
    page.at("talk").click()
    video = page.at("video")
    until(lambda: video.get_property("currentTime") > 0)
    assert page.at("status").text == "speaking" and page.is_shown("face")
    first = seen(page)
    assert first.shape == (SIDE, SIDE, 3)
    until(lambda: (seen(page) != first).any())
    until(lambda: "behind the voice" in page.at("delay").text)
    # The talk goes on: neither the server nor the page has ended it.
    assert page.local.jobs[0]._faces == 1 and page.at("status").text == "speaking"
    page.at("stop").click()
    assert page.at("status").text == "stopped" and not page.at("talk").get_property("disabled")
    until(lambda: page.local.jobs[0]._faces == 0)


@pytest.mark.parametrize("side", [LEARNT])
def test_a_head_speaks_while_the_voice_goes_on(page, tmp_path):
    """As its picture has it, its mouth now more and now less open."""
    rate_hz = 16_000
    said = read_audio(NANO_FOLDER / "score" / "0.flac", rate_hz, 10.0)
    wave = np.tile(said, round(VOICE_S * rate_hz / len(said)))
    page.fill(voice=write_wave(tmp_path / "long.wav", wave[None], rate_hz))
    page.at("talk").click()
    until(lambda: page.at("video").get_property("currentTime") > 0)
    frames = []

    def has_spoken() -> bool:
        frames.append(seen(page))
        return np.ptp(mouth_opening(np.stack(frames))) > OPEN_PX

    until(has_spoken)
    assert page.at("status").text == "speaking"
    assert found_colours(np.stack(frames)) == named_colours(PROMPT)


def test_the_microphone_and_the_end_of_a_talk(page, tmp_path):
    page.at("talk").click()  # without a file: Chromium's beeps
    until(lambda: page.at("video").get_property("currentTime") > 0)
    page.at("stop").click()
    until(lambda: page.local.jobs[0]._faces == 0)
    page.fill(voice=write_sine(tmp_path / "short.wav", seconds=0.5))
    page.at("talk").click()
    until(lambda: page.at("status").text == "ended")
    until(lambda: page.at("video").get_property("ended"))
    assert not page.is_shown("refused")
    assert page.at("video").get_property("duration") == pytest.approx(0.5, abs=0.15)


def test_who_has_no_token_is_asked_for_it(page, tmp_path):
    page.run("document.getElementById('token').value = 'wrong'")
    page.fill(voice=write_sine(tmp_path / "short.wav", seconds=0.5))
    page.at("talk").click()
    until(lambda: page.is_shown("refused"))
    assert "token" in page.at("refused").text and page.is_shown("token-row")


def test_axe_finds_nothing(page):
    page.run(resources.files("axe_core_python").joinpath("axe.min.js").read_text())
    page.run("for (const element of document.querySelectorAll('[hidden]')) element.hidden = false;")
    found = page.browser.execute_async_script(
        "axe.run(document, { rules: { 'video-caption': { enabled: false } } })"
        ".then((found) => arguments[0](found.violations.map((each) => each.id)))"
    )
    assert found == []
