"""`GET /v1/models` and SGLang's `GET /models`: the one model, under all of its names."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI

from magihuman.runtime.config import FPS
from magihuman.runtime.serving.errors import ApiError, shown
from magihuman.runtime.serving.schema import Model, ModelList, errors_of
from magihuman.runtime.serving.settings import Settings


@dataclass(frozen=True)
class ModelRoutes:
    """The model. created_at: seconds since 1970, of when it began to be served."""

    settings: Settings
    created_at: int = field(default_factory=lambda: int(time.time()))

    def add_to(self, app: FastAPI, check: Callable[..., Awaitable[None]]) -> None:
        """Bind the routes, behind the token's check."""
        closed: dict[str, Any] = {"tags": ["models"], "dependencies": [Depends(check)]}
        for path in ("/v1/models", "/models"):
            app.get(
                path,
                response_model=ModelList,
                responses=errors_of(401),
                operation_id=f"models{path.replace('/', '_')}",
                **closed,
            )(self.all)
        app.get(
            "/v1/models/{model:path}",
            response_model=Model,
            responses=errors_of(401, 404, 422),
            **closed,
        )(self.one)

    async def all(self) -> ModelList:
        """All names of the model that is served, and what suits it."""
        settings = self.settings
        return ModelList(
            data=[self._model(name) for name in settings.names],
            model_path=settings.model,
            variant=settings.variant,
            sr=settings.sr,
            size=str(settings.defaults["size"]),
            seconds=settings.suited["seconds"],
            fps=FPS,
        )

    async def one(self, model: str) -> Model:
        """One name of the model that is served."""
        if model not in self.settings.names:
            raise ApiError(
                404,
                "model_not_found",
                f"model must be one of {', '.join(self.settings.names)}, got {shown(model)!r}; GET"
                " /v1/models has them",
                "model",
            )
        return self._model(model)

    def _model(self, name: str) -> Model:
        return Model(id=name, created=self.created_at, root=self.settings.model)
