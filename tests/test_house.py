"""The house: which room may know of which other, and which guest may enter which room."""

import ast
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "meshlib"
MODULES = sorted(HOUSE.rglob("*.py"))

# Arrows point down only: a room knows those below it, never those beside or above it.
FLOORS = [
    ["core"],
    ["telemetry", "names"],
    ["filters", "balancing"],
    ["serving"],
    ["client", "server"],
    ["mux", "http", "grpc"],
    ["typed"],
    ["meshlib"],
    ["testing"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Who may be imported where, beside the standard library. A trailing slash is a whole package.
GUESTS = {
    "anyio": ["meshlib/"],
    "msgspec": [
        "meshlib/core/context.py",
        "meshlib/core/events.py",
        "meshlib/mux/",
        "meshlib/names/kubernetes/",
        "meshlib/typed/",
    ],
    "opentelemetry": ["meshlib/telemetry/"],
    "tenacity": ["meshlib/filters/retry.py"],
    "asyncio": ["meshlib/core/supervisor.py", "meshlib/grpc/"],
    "httpx": ["meshlib/http/for_httpx.py", "meshlib/names/kubernetes/"],
    "httpx2": ["meshlib/http/for_httpx2.py"],
    "uvicorn": ["meshlib/http/engines.py"],
    "hypercorn": ["meshlib/http/engines.py"],
    "h2": ["meshlib/grpc/", "meshlib/http/http2.py", "meshlib/http/streams.py"],
    "hpack": ["meshlib/grpc/"],
    "hyperframe": ["meshlib/grpc/", "meshlib/http/http2.py"],
    "grpclib": ["meshlib/grpc/"],
    "multidict": ["meshlib/grpc/"],
    "google": ["meshlib/grpc/"],
    "dns": ["meshlib/names/dns/"],
    "kazoo": ["meshlib/names/zookeeper/"],
    "trio": ["meshlib/testing/virtual.py"],
    "yaml": ["meshlib/names/kubernetes/kubeconfig.py"],
    "socksio": ["meshlib/names/kubernetes/config.py"],
}
LAZY = {"hypercorn", "socksio", "tenacity", "trio", "uvicorn", "yaml"}
TRIO = ["meshlib/core/supervisor.py", "meshlib/core/clock.py"]
"""Where trio is looked for among the modules that are loaded. It is imported by virtual time alone."""

OPTIONAL = [
    "trio",
    "uvloop",
    "httpx",
    "httpx2",
    "grpclib",
    "h2",
    "hypercorn",
    "kazoo",
    "dns",
    "yaml",
    "opentelemetry.sdk",
    "tenacity",
    "uvicorn",
]
YARDSTICK = "import asyncio, anyio, msgspec, opentelemetry.trace"


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def room_of(module: str) -> str:
    """The room of a module: its package, or itself where it stands alone."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "meshlib"


@cache
def imports_of(path: Path) -> list[tuple[str, int, bool, bool]]:
    """Each imported module with its line; is it imported as the module loads; is it there for type checkers only?"""
    found: list[tuple[str, int, bool, bool]] = []

    def visit(node: ast.AST, loading: bool, checking: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            checking = True
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            loading = False
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, loading, checking) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            for module in from_modules(path, node):
                found.append((module, node.lineno, loading, checking))
        for child in ast.iter_child_nodes(node):
            visit(child, loading, checking)

    visit(ast.parse(path.read_text("utf-8")), True, False)
    return found


def from_modules(path: Path, node: ast.ImportFrom) -> set[str]:
    """What ``from x import y`` loads: ``x``, and ``x.y`` where that is a module."""
    base = node.module or ""
    if node.level:
        package = name_of(path).split(".")
        if path.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - (node.level - 1)]
        base = ".".join([*package, base] if base else package)
    below = {f"{base}.{alias.name}" for alias in node.names} & NAMES
    return below if below and base in ("meshlib", "") else below | {base}


def test_every_room_has_its_floor():
    assert {room_of(name_of(path)) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_arrows_point_down_only(path):
    mine = room_of(name_of(path))
    for module, line, _, _ in imports_of(path):
        if module.split(".")[0] != "meshlib":
            continue
        theirs = room_of(module)
        assert theirs == mine or FLOOR[theirs] < FLOOR[mine], f"{where(path)}:{line}: {mine} must not know {theirs}"


@pytest.mark.parametrize(("side", "other"), [("calling", "serving"), ("serving", "calling")])
def test_the_two_sides_of_grpc_do_not_know_each_other(side, other):
    inside = [path for path in MODULES if where(path).startswith(f"meshlib/grpc/{side}/")]
    assert len(inside) > 10
    for path in inside:
        known = {module for module, *_ in imports_of(path)}
        assert not [module for module in known if module.startswith(f"meshlib.grpc.{other}")], where(path)


def test_no_modules_import_each_other_in_a_circle():
    below = {
        name_of(path): {m for m, _, loading, checking in imports_of(path) if loading and not checking and m in NAMES}
        for path in MODULES
    }
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in below[module] - {module}:
                walk(other, [*trail, module])
            done.add(module)

    for module in below:
        walk(module, [])


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_guests_enter_their_own_rooms_only(path):
    for module, line, loading, _ in imports_of(path):
        guest = module.split(".")[0]
        if guest == "meshlib" or (guest in sys.stdlib_module_names and guest not in GUESTS):
            continue
        rooms = GUESTS.get(guest, [])
        allowed = any(where(path) == room or (room.endswith("/") and where(path).startswith(room)) for room in rooms)
        assert allowed, f"{where(path)}:{line} imports {guest}, which belongs in {rooms or 'no room yet'}"
        assert not (loading and guest in LAZY), f"{where(path)}:{line} imports {guest} as it loads"


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_trio_is_looked_for_in_two_rooms(path):
    tree = ast.parse(path.read_text("utf-8"))
    named = any(isinstance(node, ast.Constant) and node.value == "trio" for node in ast.walk(tree))
    assert not named or where(path) in TRIO


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_a_module_says_what_it_is_and_is_no_longer_than_one_can_read(path):
    text = path.read_text("utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{where(path)} has no docstring"
    assert len(text.splitlines()) <= 400, f"{where(path)} is longer than 400 lines: it holds two ideas"


# --- importing it -----------------------------------------------------------------------------------------------------


def run(program: str, **env: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, check=True, capture_output=True, text=True, timeout=50
    )
    return done.stdout


def test_importing_it_imports_nothing_that_is_optional():
    loaded = run(f"import sys, meshlib; print(*[m for m in {OPTIONAL} if m in sys.modules])").split()
    assert loaded == []


def test_a_client_and_a_server_work_without_what_is_optional():
    run(f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import anyio, meshlib
async def echo(request):
    return meshlib.mux.Response(request.body)
async def main():
    async with meshlib.mux.serve(echo) as server, meshlib.mux.client(server.address) as client:
        assert (await client(meshlib.mux.Request(b"x"))).body == b"x"
anyio.run(main)
""")


@pytest.mark.parametrize(
    ("guest", "made", "extra"),
    [
        ("httpx", "meshlib.http.Transport()", "http"),
        ("httpx", "meshlib.http.client()", "http"),
        ("httpx, httpx2", "meshlib.client(Greeter, 'http://127.0.0.1:1')", "http"),
        ("httpx2", "meshlib.http.Httpx2Transport()", "httpx2"),
        ("h2", "meshlib.http.Transport(http2=True)", "http2"),
        ("grpclib", "meshlib.grpc.Channel('127.0.0.1:1')", "grpc"),
        ("grpclib", "meshlib.grpc.Server([])", "grpc"),
        ("h2", "meshlib.grpc.Channel('127.0.0.1:1')", "grpc"),
        ("grpclib", "meshlib.client(Greeter, 'grpc://127.0.0.1:1')", "grpc"),
        ("grpclib", "meshlib.serve(Greeter(), 'grpc://127.0.0.1:0')", "grpc"),
        ("uvicorn", "anyio.run(serving, 'http://127.0.0.1:0')", "http-server"),
        ("dns", "meshlib.client(Greeter, 'dns://localhost:1')", "dns"),
    ],
)
def test_what_is_missing_is_told_with_the_extra_that_has_it(guest, made, extra):
    told = run(f"""
import sys
sys.modules.update(dict.fromkeys({guest.split(", ")}))
import anyio, meshlib
class Greeter:
    @meshlib.rpc
    async def hello(self) -> str:
        return "hello"
async def serving(address):
    await meshlib.serve(Greeter(), address)
try:
    {made}
except meshlib.ConfigurationError as error:
    print(error)
""")
    assert f"pip install 'meshlib-rpc[{extra}]'" in told
    assert guest.split(",")[0] in told


@pytest.mark.parametrize("room", ["http", "grpc"])
def test_a_module_of_ours_that_is_missing_is_nobody_s_extra(room):
    run(f"""
import sys, meshlib
sys.modules["meshlib.client"] = None
try:
    meshlib.{room}.connections
except ModuleNotFoundError as error:
    assert error.name == "meshlib.client", error.name
""")


def test_importing_it_is_quick_beside_what_it_stands_on(tmp_path):
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    # The processor's time: what others do meanwhile does not count.
    timed = "import time; t = time.process_time(); {}; print(time.process_time() - t)"
    ours, theirs = [], []
    for _ in range(6):
        theirs.append(float(run(timed.format(YARDSTICK), **compiled)))
        ours.append(float(run(timed.format("import meshlib"), **compiled)))
    assert min(ours) <= 2.5 * min(theirs)


# --- the checks themselves --------------------------------------------------------------------------------------------


def test_floors_are_checked_in_the_order_that_is_written():
    for lower, upper in pairwise(FLOORS):
        assert all(FLOOR[a] < FLOOR[b] for a in lower for b in upper)


def test_imports_are_found_in_every_form(tmp_path):
    path = HOUSE / "core" / "service.py"
    tree = ast.parse("from ..names import addr\nfrom .. import mux\nfrom . import errors, stack\nfrom .env import Env")
    found = [from_modules(path, node) for node in tree.body]
    assert found == [
        {"meshlib.names", "meshlib.names.addr"},
        {"meshlib.mux"},
        {"meshlib.core", "meshlib.core.errors", "meshlib.core.stack"},
        {"meshlib.core.env"},
    ]
    assert ("meshlib.core.env", True) in {(m, checking) for m, _, _, checking in imports_of(path)}
