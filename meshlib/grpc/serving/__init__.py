"""The server's side of gRPC: `Server`, with grpclib's handlers below the server stack.

A ``connection`` reads HTTP/2; each call on it begins with a ``head`` that a stranger may have sent, is looked up among
the ``methods``, and goes through the stack as a ``call`` to its handler, which is given a ``stream``.
"""
