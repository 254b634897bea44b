"""A face that answers, over a WebSocket: a voice in, and fragmented mp4 out.

`opening` reads what a client asks for, `bridge` is between the process that speaks HTTP and that of
the engine, `talk` has one from its beginning to its end, `routes` says where it is, and `speaking`
is the engine's side.
"""
