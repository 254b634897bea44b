"""Chromium, and what somebody does with the server's page in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
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
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",  # and is given to every page
    "--window-size=1100,1000",
)


@contextmanager
def chromium(profile: Path) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What somebody does with it."""

    def __init__(self, browser: WebDriver, url: str, token: str | None = None) -> None:
        """Open it anew: it knows nothing of before, but the token."""
        self.browser = browser
        browser.get("about:blank")
        browser.get(url)
        self.run("sessionStorage.clear(); localStorage.clear()")
        if token is not None:
            self.run("sessionStorage.setItem('token', arguments[0])", token)
        browser.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def at(self, name: str):
        return self.browser.find_element(By.ID, name)

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            element = self.at(name)
            if element.get_attribute("type") != "file":
                element.clear()
            element.send_keys(str(value))

    def value(self, name: str) -> str:
        return self.at(name).get_property("value")

    def is_shown(self, name: str) -> bool:
        return self.at(name).is_displayed()

    def video_name(self) -> str:
        """The id of the video that is shown."""
        return self.browser.current_url.rpartition("#")[2]

    def errors(self) -> list[str]:
        """Of scripts and of the page's own policy; refusals that a test provokes are none."""
        lines = [line["message"] for line in self.browser.get_log("browser")]
        return [line for line in lines if "status of" not in line]
