"""The client's side of gRPC: `Channel`, which stubs take for grpclib's, and what is below it.

A call goes from a stub's ``stream`` (and ``outgoing``) as a ``call.Request`` down the client stack, which ends in a
``session``: one HTTP/2 connection, of which the ``pool`` of each endpoint has one or more, made by the ``connector``.
An ``exchange`` is one call on it.
"""
