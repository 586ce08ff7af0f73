"""What is given to the wrong protocol, or in another library's form, is told what would be right."""

import pytest

import meshlib
from meshlib import grpc, mux


class Greeter:
    @meshlib.rpc
    async def hello(self, name: str) -> str:
        return f"hello, {name}"


async def app(scope, receive, send):
    pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: meshlib.serve(app, "127.0.0.1:0"), "an ASGI app is served at http://host:port"),
        (lambda: meshlib.serve(app, "grpc://127.0.0.1:0"), "an ASGI app is served at http://host:port"),
        (lambda: meshlib.serve(Greeter, "127.0.0.1:0"), "serve an instance, not the class"),
        (lambda: meshlib.serve(Greeter, "http://127.0.0.1:0"), "serve an instance, not the class"),
        (lambda: meshlib.serve(Greeter(), "127.0.0.1:0", limits=grpc.Limits()), r"give meshlib\.mux\.Limits"),
        (lambda: meshlib.serve(Greeter(), "http://127.0.0.1:0", limits=mux.Limits()), r"meshlib\.concurrency_limit"),
        (lambda: meshlib.serve(app, "http://127.0.0.1:0", limits=grpc.Limits()), r"meshlib\.concurrency_limit"),
        (lambda: meshlib.serve(Greeter(), "grpc://127.0.0.1:0", limits=mux.Limits()), r"give meshlib\.grpc\.Limits"),
        (lambda: meshlib.client(Greeter, "127.0.0.1:1", limits=grpc.Limits()), r"give meshlib\.mux\.Limits"),
        (lambda: meshlib.client(Greeter, "http://127.0.0.1:1", limits=mux.Limits()), "limits are Mux's"),
        (lambda: meshlib.client(Greeter, "grpc://127.0.0.1:1", limits=mux.Limits()), "max_message="),
        (lambda: meshlib.serve(app, "http://127.0.0.1:0", linger=None), r"linger=None\): give seconds"),
        (lambda: meshlib.serve(app, "http://127.0.0.1:0", linger=-1), r"linger=-1\): give seconds"),
    ],
)
def test_says_what_would_be_right(make, says):
    with pytest.raises(meshlib.ConfigurationError, match=says):
        make()


@pytest.mark.parametrize("linger", [0, 0.5])
def test_an_app_s_server_may_linger_for_another_time(linger):
    assert meshlib.serve(app, "http://127.0.0.1:0", linger=linger)._linger == linger
