"""A process that serves an app: ``python -m tests.http.worker uvicorn|hypercorn APP PORT [LINGER [CERT KEY]]``.

``APP`` is ``fastapi`` or ``starlette``, with the middleware, or ``plain``: the application of ``servers.py`` alone.
"""

import sys
from typing import Annotated, Any

import anyio

from meshlib.http import Middleware


def fastapi_app(linger: float) -> Any:
    """With two routes."""
    from fastapi import Depends, FastAPI
    from starlette.requests import Request

    app = FastAPI()
    app.add_middleware(Middleware, linger=linger)

    @app.get("/users/{number}")
    async def user(number: int) -> dict[str, int]:
        await anyio.sleep(0.01)
        return {"number": number}

    async def body(request: Request) -> bytes:
        return await request.body()

    @app.post("/echo")
    async def echo(text: Annotated[bytes, Depends(body)]) -> dict[str, str]:
        return {"body": text.decode("latin-1")}

    @app.post("/numbers")
    async def numbers(given: list[int]) -> dict[str, int]:
        return {"sum": sum(given)}

    @app.get("/slow/{seconds}")
    async def slow(seconds: float) -> dict[str, float]:
        try:
            await anyio.sleep(seconds)
        finally:
            print("ended", flush=True)
        return {"seconds": seconds}

    @app.get("/readyz")
    async def ready() -> str:
        return "ready"

    return app


def starlette_app(linger: float) -> Any:
    """The same."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware as Entry
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def user(request: Any) -> JSONResponse:
        await anyio.sleep(0.01)
        return JSONResponse({"number": int(request.path_params["number"])})

    async def slow(request: Any) -> JSONResponse:
        try:
            await anyio.sleep(float(request.path_params["seconds"]))
        finally:
            print("ended", flush=True)
        return JSONResponse({})

    async def ready(request: Any) -> JSONResponse:
        return JSONResponse("ready")

    routes = [Route("/users/{number}", user), Route("/slow/{seconds}", slow), Route("/readyz", ready)]
    return Starlette(routes=routes, middleware=[Entry(Middleware, linger=linger)])


def plain_app(linger: float) -> Any:
    """What the other tests ask."""
    from .servers import application

    return application


def main(server: str, kind: str, port: int, linger: float = 0.0, certificate: tuple[str, ...] = ()) -> None:
    """Serve until SIGTERM."""
    app = {"fastapi": fastapi_app, "starlette": starlette_app, "plain": plain_app}[kind](linger)
    cert, key = certificate or (None, None)
    if server == "uvicorn":
        import uvicorn

        uvicorn.run(
            app, host="127.0.0.1", port=port, log_level="warning", backlog=4096, ssl_certfile=cert, ssl_keyfile=key
        )
        return
    import asyncio

    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile = cert, key
    config.loglevel = "WARNING"
    config.keep_alive_max_requests = 1 << 30  # after 1000 it sends GOAWAY, and abandons the streams that are open
    asyncio.run(serve(app, config))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), tuple(sys.argv[5:7]))
