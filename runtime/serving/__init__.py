"""`magihuman serve`: videos over HTTP on Ray Serve; needs the extra `[serve]`.

`app` starts it, `api` and `routes` speak HTTP and know jobs but no engine, `replica` runs an engine
and knows no HTTP. Records and videos lie on disk (`store`), so that a restart finds them, or where
several servers have them (`shared`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def application(args: Mapping[str, Any]) -> Application:
    """Return what Serve's config files name `magihuman.runtime.serving:application`.

    args: options of `magihuman serve`, see `cli.application`, which has the errors, too.
    """
    # The options are the command line's, which is above: nothing here may import it by name.
    return importlib.import_module("magihuman.runtime.cli.application").application(args)
