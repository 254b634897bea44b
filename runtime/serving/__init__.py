"""`magihuman serve`: videos over HTTP on Ray Serve; needs the extra `[serve]`.

`app` starts it, `api` and `routes` speak HTTP and know jobs but no engine, `replica` runs an engine
and knows no HTTP. Jobs and their videos lie on disk (`store`), so that a restart finds them.
"""
