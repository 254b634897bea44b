"""HTTP on a socket, within bounds: of headers, of time, and of connections. Knows any ASGI app.

`server` listens, `connection` is one client, `crowd` all of them.
"""
