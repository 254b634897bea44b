"""The page, its style and its scripts, for everybody; they may ask this server alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse

from magihuman.runtime.config import VARIANTS
from magihuman.runtime.serving.errors import ApiError
from magihuman.runtime.serving.settings import Settings

STATIC = "magihuman.runtime.serving"  # where the folder `static` is
PAGE, LIVE = "page.html", "live.html"
PLACE = re.compile(r"\{\{([a-z-]+)\}\}")  # {{seconds}}
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
# The page loads its own files alone, runs nothing that is written into it, and may ask this server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)


@dataclass(frozen=True)
class PageRoutes:
    """The page and its files.

    Attributes:
        settings: have what the page's form begins with.
    """

    settings: Settings

    def add_to(self, app: FastAPI) -> None:
        """Bind the routes, which are for everybody."""
        app.get("/", response_class=HTMLResponse, include_in_schema=False)(self.page)
        app.get("/live", response_class=HTMLResponse, include_in_schema=False)(self.live)
        app.get("/static/{name}", include_in_schema=False)(self.file)

    async def page(self) -> HTMLResponse:
        """Answer with the page, filled in for the model."""
        return self._filled(PAGE)

    async def live(self) -> HTMLResponse:
        """Answer with the page of a face that answers."""
        return self._filled(LIVE)

    async def file(self, name: str) -> Response:
        """Answer with a style or script of the page."""
        kind = files().get(name)
        if kind is None:
            raise ApiError(404, "not_found", "there is no such file")
        return Response(_read(name), media_type=kind)

    def _filled(self, name: str) -> HTMLResponse:
        values = self._values()
        text = PLACE.sub(lambda found: values[found[1]], _read(name).decode())
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    def _values(self) -> Mapping[str, str]:
        """What is written into the page, as HTML."""
        settings = self.settings
        width, height = settings.suited["width"], settings.suited["height"]
        return {
            "seconds": f"{settings.suited['seconds']:g}",
            "max-seconds": f"{settings.limits.seconds:g}",
            "size": f"{width}x{height}",
            "turned-size": f"{height}x{width}",
            "prompt-chars": str(settings.limits.prompt_chars),
            "enhance": "hidden" if settings.enhancer is None else "",
            "guided": "" if VARIANTS[settings.variant].guidance is not None else "hidden",
            "prompts": "".join(f"<option>{escape(prompt)}</option>" for prompt in settings.prompts),
            "has-prompts": "" if settings.prompts else "hidden",
        }


@cache
def files() -> Mapping[str, str]:
    """Return the media type of each file that the page loads, by its name."""
    names = (place.name for place in resources.files(STATIC).joinpath("static").iterdir())
    suffixes = {name: name[name.rfind(".") :] for name in names}
    return {name: MEDIA_TYPES[end] for name, end in suffixes.items() if end in MEDIA_TYPES}


def _read(name: str) -> bytes:
    return resources.files(STATIC).joinpath("static", name).read_bytes()
