"""The documentation is true: every code block runs, every output shown is the real one, every link leads somewhere.

What may stand in a fence, and what happens to it:

``python``   Runs. A page's blocks run in order, in one namespace and one event loop, as if they were typed into
             ``python -m asyncio``; ``await`` and ``async with`` may stand at the top level. A block that calls
             ``anyio.run`` itself gets a thread without a loop. What a block prints must be shown in the next block.
``text``     The output of the Python block before it. ``…`` stands for any part of a line, alone for any lines. A block
             that begins with ``meshlib/`` is the tree of modules, and is compared with the package.
``console``  Lines that begin with ``$`` are commands: make targets, modules and their options, extras and groups must
             exist. What curl asks for must be asked for by the page's Python as well, which shows that it is there.
``toml``, ``json``  Must parse.

Anything else is an error, so that no block goes unchecked.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.util
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from opentelemetry import trace as otel
from opentelemetry.util._once import Once

import meshlib
from meshlib import mux
from meshlib.client import PLACES as CLIENT_PLACES
from meshlib.client import default_layers as client_layers
from meshlib.core import errors
from meshlib.server import PLACES as SERVER_PLACES
from meshlib.server import default_layers as server_layers

from .conftest import missing

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]

each_page = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """One fence: where its first line of code stands, its language, and what is in it."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}"


class Untrue(Exception):
    """A page says what is not so."""


# --- reading ----------------------------------------------------------------------------------------------------------


def blocks_of(page: Path) -> list[Block]:
    """Every fence of a page."""
    blocks: list[Block] = []
    inside: list[str] | None = None
    language, start = "", 0
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        fence = re.match(r"\s*(```+|~~~+)(.*)", line)
        if fence is None:
            if inside is not None:
                inside.append(line)
        elif inside is None:
            if not line.startswith("```") or line.startswith("````"):
                raise Untrue(f"{page.name}:{number}: write a fence as three backticks at the start of the line")
            inside, language, start = [], fence[2].strip(), number + 1
        elif line.rstrip() == "```":
            blocks.append(Block(page, start, language, "\n".join(inside)))
            inside = None
        else:
            raise Untrue(f"{page.name}:{number}: a fence inside a fence")
    if inside is not None:
        raise Untrue(f"{page.name}:{start - 1}: a fence that does not end")
    return blocks


def prose_of(page: Path) -> str:
    """A page without its fences."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


# --- running ----------------------------------------------------------------------------------------------------------


def check_page(page: Path) -> None:
    """Run a page's blocks.

    Raises:
        Untrue: One of them is not as it says; tells where.
    """
    blocks = blocks_of(page)
    name = f"docs_page_{page.stem.replace('-', '_').lower()}"
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses and annotations look their module up
    try:
        anyio.run(_check_blocks, blocks, vars(module))
    finally:
        del sys.modules[name]


async def _check_blocks(blocks: Sequence[Block], namespace: dict[str, Any]) -> None:
    printed: tuple[Block, str] | None = None
    for block in blocks:
        if block.language == "text":
            if printed is not None:
                _compare(block, printed[1])
                printed = None
            elif block.text.startswith("meshlib/"):
                _check_tree(block)
            else:
                raise Untrue(f"{block.where}: a text block that is the output of no Python block")
            continue
        _all_shown(printed)
        printed = None
        if block.language == "python":
            printed = block, await _run(block, namespace)
        elif block.language == "console":
            _check_console(block)
        elif block.language in ("toml", "json"):
            try:
                (tomllib if block.language == "toml" else json).loads(block.text)
            except ValueError as error:
                raise Untrue(f"{block.where}: not {block.language}: {error}") from error
        else:
            raise Untrue(f"{block.where}: a block of language {block.language!r} is checked by nobody")
    _all_shown(printed)


async def _run(block: Block, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    try:
        # Lines count from the page's start, so that tracebacks point into the page.
        source = "\n" * (block.line - 1) + block.text
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, str(block.page), "exec", flags=flags, dont_inherit=True)
        with contextlib.redirect_stdout(out):
            if code.co_flags & inspect.CO_COROUTINE:
                await eval(code, namespace)
            elif "anyio.run(" in block.text:
                await anyio.to_thread.run_sync(exec, code, namespace)
            else:
                exec(code, namespace)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(block.page)]
        at = lines[-1] if lines else getattr(error, "lineno", None) or block.line
        story = "".join(traceback.format_exception(error))
        raise Untrue(f"{block.where}: line {at} of the page failed\n{story}\nprinted: {out.getvalue()}") from None
    return out.getvalue()


def _all_shown(printed: tuple[Block, str] | None) -> None:
    if printed is not None and printed[1].strip():
        raise Untrue(f"{printed[0].where}: this block prints, and the page does not show it:\n{printed[1]}")


def _compare(block: Block, real: str) -> None:
    if not matches(block.text, real):
        raise Untrue(f"{block.where}: the output is another\n--- shown\n{block.text}\n--- real\n{real}")


def matches(shown: str, real: str) -> bool:
    """Is ``real`` what is shown, with ``…`` for any part of a line, and a line of it alone for any lines?"""
    pattern = ""
    for line in shown.strip("\n").splitlines():
        if line.strip() == "…":
            pattern += r"(?:[^\n]*\n)*?"
        else:
            pattern += r"[^\n]*?".join(map(re.escape, line.rstrip().split("…"))) + r"[ ]*\n"
    return re.fullmatch(pattern, real.strip("\n") + "\n") is not None


# --- commands ---------------------------------------------------------------------------------------------------------


def _check_console(block: Block) -> None:
    commands = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    if not commands:
        raise Untrue(f"{block.where}: no command; commands begin with '$ '")
    for command in commands:
        words = shlex.split(command, comments=True)
        problem = _problem_of_curl(words[1:], block.page) if words[0] == "curl" else _problem_of(words)
        if problem:
            raise Untrue(f"{block.where}: {command!r}: {problem}")


def _problem_of(words: list[str]) -> str:
    match words:
        case ["make", *rest]:
            targets = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
            assert targets is not None
            unknown = [word for word in rest if "=" not in word and word not in targets[1].split()]
            return f"the Makefile has no target {', '.join(unknown)}" if unknown else ""
        case ["pip", "install", *rest]:
            return next(filter(None, map(_problem_of_package, rest, [None, *rest])), "")
        case ["python", "-m", module, *rest]:
            if importlib.util.find_spec(module) is None:
                return f"there is no module {module}"
            if module == "pytest":
                paths = [word for word in rest if not word.startswith("-")]
                return next((f"there is no {path}" for path in paths if not (ROOT / path.split("::")[0]).exists()), "")
            if module == "grpc_tools.protoc":
                plugins = {word[2:].partition("_out=")[0] for word in rest if "_out=" in word} - {"python", "pyi"}
                unknown = [
                    each for each in plugins if not (Path(sys.executable).parent / f"protoc-gen-{each}").exists()
                ]
                return f"there is no plugin {', '.join(unknown)}" if unknown else ""
            options = [word for word in rest if word.startswith("-")]
            unknown = [option for option in options if option not in _help_of(module)]
            return f"{module} has no option {', '.join(unknown)}" if unknown else ""
    return "neither make, nor pip install, nor python -m, nor curl; teach tests/test_docs.py to check it"


def _problem_of_package(word: str, before: str | None) -> str:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    if before == "--group":
        return "" if word in groups else f"no such dependency group: {word}"
    of_tests = {re.split(r"[^\w-]", each)[0] for each in groups["test"]}
    if word in ("--editable", "--upgrade", "--group") or word.startswith("pip>=") or word in of_tests:
        return ""
    name, _, extras = word.rstrip("]").partition("[")
    unknown = [e for e in extras.split(",") if e and e not in _project()["optional-dependencies"]]
    return "" if name in (_project()["name"], ".") and not unknown else f"no such package or extra: {word}"


def _problem_of_curl(words: list[str], page: Path) -> str:
    match words:
        case ["--json", body, url]:
            try:
                json.loads(body)
            except ValueError as error:
                return f"not json: {error}"
        case [url]:
            pass
        case _:
            return "curl with other options than --json"
    path = "/" + url.removeprefix("http://").partition("?")[0].partition("/")[2]
    asked = "".join(block.text for block in blocks_of(page) if block.language == "python")
    return "" if path in asked else f"no Python on this page asks for {path}"


@functools.cache
def _help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout


@functools.cache
def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def _check_tree(block: Block) -> None:
    """The tree of modules names each module once, and no other."""
    shown: list[str] = []
    folders: list[str] = []
    for line in block.text.splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 2
        folders[depth:] = [entry[2]] if entry[2].endswith("/") else []
        if entry[2].endswith(".py"):
            shown.append("".join(folders) + entry[2])
    real = {p.relative_to(ROOT).as_posix() for p in (ROOT / "meshlib").rglob("*.py") if p.name != "__init__.py"}
    listed = {path for path in shown if not path.endswith("__init__.py")}
    if listed != real or len(shown) != len(set(shown)):
        missing, extra = sorted(real - listed), sorted(listed - real)
        raise Untrue(f"{block.where}: the tree misses {missing}, and names {extra}, which is not there")


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Blocks may write files, import the examples, and start processes that do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A page may install a tracer provider. OpenTelemetry lets a process do it once, and no other test is to see it.
    monkeypatch.setattr(otel, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(otel, "_TRACER_PROVIDER_SET_ONCE", Once())
    return tmp_path


@pytest.mark.usefixtures("scratch")
@each_page
def test_blocks(page: Path) -> None:
    if '"openssl' in page.read_text("utf-8") and shutil.which("openssl") is None:
        missing("its certificates are made with openssl")
    problem = ""
    try:
        check_page(page)
    except Untrue as error:
        problem = str(error)
    if problem:
        with warnings.catch_warnings():
            # What a page that stopped half-way has left open is no fault of the test that comes next.
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        pytest.fail(problem, pytrace=False)


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@each_page
def test_links(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert not wrong, f"{page.name} links to nothing: {wrong}"


def test_every_page_can_be_reached() -> None:
    names = {page.name for page in PAGES} - {"README.md"}
    index = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "index.md").read_text("utf-8"))) | {"index.md"}
    nav = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert index == names
    assert nav == names


def test_every_public_name_is_explained() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    missing = [name for name in (*meshlib.__all__, *mux.__all__) if not re.search(rf"\b{name}\b", text)]
    assert not missing


def _table_after(page: Path, title: str) -> Iterator[list[str]]:
    """The rows of the first table below a title, without its head; code marks are taken off."""
    _, _, rest = page.read_text("utf-8").partition(f"# {title}\n")
    assert rest, f"{page.name} has no title {title!r}"
    table = re.search(r"^\|.*\n\|[ :|-]+\n((?:\|.*\n)+)", rest, re.MULTILINE)
    assert table is not None, f"no table below {title!r}"
    for row in table[1].splitlines():
        yield [cell.strip().strip("`") for cell in row.strip().strip("|").split("|")]


@pytest.mark.parametrize(
    ("page", "title", "places", "layers"),
    [
        (ROOT / "README.md", "What a client does by default", CLIENT_PLACES, client_layers()),
        (DOCS / "clients.md", "The stack", CLIENT_PLACES, client_layers()),
        (DOCS / "servers.md", "The stack", SERVER_PLACES, server_layers()),
    ],
    ids=["README", "clients", "servers"],
)
def test_stack_tables(page: Path, title: str, places: tuple[str, ...], layers: tuple[Any, ...]) -> None:
    """A table of a stack has each place once, in order, with the default that stands there."""
    defaults = {layer.place: repr(layer) for layer in layers}
    shown = [(row[0], row[-1]) for row in _table_after(page, title)]
    assert shown == [(place, defaults.get(place, "—")) for place in places]


def test_error_table() -> None:
    """The table of errors has each one, with the facts that its class has, in the order of the module's own tree."""
    says = {None: "unknown", True: "yes", False: "no"}
    real = []
    for name in re.findall(r"^    [├└│─ ]*(\w+Error|[A-Z]\w+)\b", errors.__doc__ or "", re.MULTILINE):
        kind = getattr(errors, name)
        also = next((c.__name__ for c in kind.__mro__ if c.__module__ == "builtins" and c is not Exception), "—")
        real.append([name, also if also != "BaseException" else "—", says[kind.processed], says[kind.retryable]])
    shown = [row[:4] for row in _table_after(DOCS / "errors.md", "Errors")]
    kinds = (getattr(errors, name) for name in errors.__all__)
    assert {name for name, *_ in real} == {
        k.__name__ for k in kinds if isinstance(k, type) and issubclass(k, Exception)
    }
    assert shown == real


def test_every_metric_is_listed() -> None:
    """What a client and a server report in a life with successes and failures is in the list, by its whole name."""
    listed = _listed_metrics()
    names = {_plain(name) for name in anyio.run(_metrics_of_a_life)}
    assert not names - listed


def test_every_metric_of_the_source_is_listed() -> None:
    """Those that only rare events bring about are there too, by the end of their names; and no others."""
    listed = {re.sub(r"((?<=/)<\w+>/?|<\w+>)+$", "", name) for name in _listed_metrics()}
    made = set()
    for path in (ROOT / "meshlib").rglob("*.py"):
        made |= set(re.findall(r'\.(?:counter|gauge|histogram)\(f?"([^"{]+)', path.read_text("utf-8")))
    assert not [name for name in made if not any(f"/{entry}".endswith(f"/{name}") for entry in listed)]
    assert not [entry for entry in listed if not any(f"/{entry}".endswith(f"/{name}") for name in made)]


def _listed_metrics() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)`", (DOCS / "metrics.md").read_text("utf-8"), re.MULTILINE))


def _plain(name: str) -> str:
    name = re.sub(r"\.(count|sum|min|max|avg|p\d+)$", "", name)
    name = re.sub(r"^endpoints/[^/]+/", "endpoints/<address>/", name)
    name = re.sub(r"^decisions/\w+/\w+$", "decisions/<kind>/<code>", name)
    return re.sub(r"\b(failures)/[A-Z]\w*$|\b(failures)/reply$", "failures/<error>", name)


async def _metrics_of_a_life() -> set[str]:
    async def handle(request: mux.Request) -> mux.Response:
        if request.body == b"fail":
            raise ValueError
        return mux.Response()

    server = await mux.serve(handle)
    client = mux.client(server.address)
    await client(mux.Request())
    with contextlib.suppress(meshlib.RemoteError):
        await client(mux.Request(b"fail"))
    await server.aclose()
    names = {*client.metrics(), *server.metrics()}
    await client.aclose()
    return names


# --- the checker, checked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\nx = 1\n\n1 / 0\n```", r"page.md:2: line 4 of the page failed\n(.|\n)*ZeroDivisionError"),
        ("```python\nif\n```", r"page.md:2: line 2 of the page failed\n(.|\n)*SyntaxError"),
        ("```python\nprint(1)\n```", "page.md:2: this block prints, and the page does not show it"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "page.md:6: the output is another"),
        ("```text\n2\n```", "page.md:2: a text block that is the output of no Python block"),
        ("```text\nmeshlib/\n  no.py\n```", r"page.md:2: the tree misses \[.+\], and names \['meshlib/no.py'\]"),
        ("```\nx\n```", "page.md:2: a block of language ''"),
        ("```sh\nmake demo\n```", "page.md:2: a block of language 'sh'"),
        ("```console\nmake demo\n```", "page.md:2: no command"),
        ("```console\n$ make tea\n```", "page.md:2: 'make tea': the Makefile has no target tea"),
        ("```console\n$ python -m examples.tea\n```", "there is no module examples.tea"),
        ("```console\n$ python -m examples.echo --tea\n```", "has no option --tea"),
        ("```console\n$ pip install meshlib-rpc[tea]\n```", "no such package or extra"),
        ("```console\n$ pip install '.[tea]'\n```", "no such package or extra"),
        ("```console\n$ pip install tea\n```", "no such package or extra"),
        ("```console\n$ pip install --editable . --group tea\n```", "no such dependency group: tea"),
        ("```console\n$ python -m grpc_tools.protoc --tea_out=. x.proto\n```", "there is no plugin tea"),
        ("```console\n$ curl localhost:8000/tea\n```", "no Python on this page asks for /tea"),
        ("```console\n$ curl --json '{' localhost:8000/tea\n```", "not json"),
        ("```console\n$ curl --data x localhost:8000/tea\n```", "other options than --json"),
        ("```console\n$ rm x\n```", "teach tests/test_docs.py"),
        ("```json\n{\n```", "page.md:2: not json"),
        ("```toml\n=\n```", "page.md:2: not toml"),
        ("```python\n", "page.md:1: a fence that does not end"),
        ("  ```python\n  ```", "page.md:1: write a fence as three backticks"),
    ],
)
def test_complains(tmp_path: Path, page: str, complaint: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(page, "utf-8")
    with pytest.raises(Untrue, match=complaint):
        check_page(path)


def test_blocks_share_a_namespace_and_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nimport anyio\nevent = anyio.Event()\nasync def main() -> None: print('in a thread')\n```\n"
        "```python\nanyio.run(main)\n```\n```text\nin a …d\n```\n"
        "```python\nevent.set()\nawait event.wait()\nprint('a', 'b', 'c', sep='\\n')\n```\n```text\na\n…\nc\n```\n",
        "utf-8",
    )
    check_page(path)


def test_accepts_commands_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nurl = '/Shop/buy?item=tea'\n```\n```console\n"
        "$ curl 'localhost:8000/Shop/buy?item=tea'\n"
        '$ curl --json \'{"item": "tea"}\' http://localhost:8000/Shop/buy\n'
        '$ pip install --upgrade "pip>=25.1"\n'
        "$ pip install --editable '.[http,grpc]' --group examples\n```\n",
        "utf-8",
    )
    check_page(path)


@pytest.mark.parametrize(
    ("shown", "real", "same"),
    [
        ("a", "a\n", True),
        ("a\n", "a", True),
        ("a", "b", False),
        ("a … c", "a b c", True),
        ("a … c", "a b\nc", False),
        ("a\n…\nc", "a\nc", True),
        ("a\n…\nc", "a\nb\nb\nc", True),
        ("a\n…", "a", True),
        ("…", "", True),
        ("a.c", "abc", False),
    ],
)
def test_matches(shown: str, real: str, same: bool) -> None:
    assert matches(shown, real) is same
