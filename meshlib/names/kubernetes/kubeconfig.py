"""kubeconfig files: what they say together, as kubectl reads them.

``KUBECONFIG`` may name several files. They are merged by kubectl's rule: of entries with one name the first counts, and
so does the first ``current-context``; files that do not exist are passed over. The current context picks a cluster and
a user, and these alone are looked at closely, by `meshlib.names.kubernetes.entries`.

JSON needs nothing, YAML needs PyYAML: its safe loader, and the one in Python, since that in C is quicker but crashes
the process on input that is nested deeply enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigurationError, shown
from .entries import Cluster, Entry, User, cluster_of, kind_of, read_file, text_of, user_of

__all__ = ["Context", "merged", "parse", "read"]


@dataclass(frozen=True, slots=True)
class Context:
    """The current context of some files.

    Attributes:
        name: Its name.
        namespace: The namespace that it prefers, or ``default``.
        cluster: Where to go.
        user: As whom.
        source: The file that names it, for messages.
    """

    name: str
    namespace: str
    cluster: Cluster
    user: User
    source: str


def read(paths: Sequence[Path]) -> Context | None:
    """The current context of these files; ``None`` if none of them exists. Blocks: for worker threads.

    Raises:
        ConfigurationError: A file cannot be read or understood; says which file, and which key.
    """
    files = [(path, parse(read_file(path, "kubeconfig"), str(path))) for path in paths if _is_there(path)]
    return merged(files) if files else None


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True  # reading it says what is wrong
    return True


def parse(data: bytes, source: str) -> dict[str, Any]:
    """One file's content.

    Raises:
        ConfigurationError: It is neither JSON nor YAML with a mapping at its top.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{source}: not UTF-8: {error}") from error
    try:
        content = json.loads(text) if text.lstrip()[:1] == "{" else None
    except (ValueError, RecursionError):
        content = None  # YAML's flow style begins with a brace as well
    if content is None:
        content = _yaml(text, source)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{source}: expected a kubeconfig, found {kind_of(content)}")
    return content


def _yaml(text: str, source: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError(
            f"{source}: a kubeconfig in YAML needs PyYAML: pip install 'meshlib-rpc[kubernetes]'"
        ) from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigurationError(f"{source}{line}: not YAML: {shown(str(problem))}") from error


def merged(files: Sequence[tuple[Path, Mapping[str, Any]]]) -> Context:
    """The current context of parsed files, the first of which counts most.

    Raises:
        ConfigurationError: There is no such context, cluster or user, or one is malformed.
    """
    named = ((path, text_of(content, "current-context", str(path))) for path, content in files)
    source, name = next(((path, name) for path, name in named if name), (None, ""))
    every = ", ".join(str(path) for path, _ in files)
    if source is None:
        raise ConfigurationError(f"{every}: no current-context; there are contexts {_names(files, 'contexts')}")
    context = _entry(files, "contexts", "context", name, f"{source}: current-context {name!r}")
    where = context.where
    cluster_name, user_name = text_of(context.body, "cluster", where), text_of(context.body, "user", where)
    if not cluster_name:
        raise ConfigurationError(f"{where}: it names no cluster")
    cluster = cluster_of(_entry(files, "clusters", "cluster", cluster_name, f"{where}: cluster {cluster_name!r}"))
    user = User(where=where)
    if user_name:
        user = user_of(_entry(files, "users", "user", user_name, f"{where}: user {user_name!r}"), cluster)
    return Context(name, text_of(context.body, "namespace", where) or "default", cluster, user, str(source))


def _items(path: Path, content: Mapping[str, Any], section: str) -> list[Mapping[str, Any]]:
    items = content.get(section) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConfigurationError(f"{path}: {section}: expected a list of mappings")
    return items


def _names(files: Sequence[tuple[Path, Mapping[str, Any]]], section: str) -> str:
    names = [str(item.get("name")) for path, content in files for item in _items(path, content, section)]
    return shown(", ".join(dict.fromkeys(names))) or "(none)"


def _entry(files: Sequence[tuple[Path, Mapping[str, Any]]], section: str, key: str, name: str, who: str) -> Entry:
    for path, content in files:
        for item in _items(path, content, section):
            if item.get("name") == name:
                body = item.get(key)
                where = f"{path}: {section}: {name!r}"
                if body is not None and not isinstance(body, dict):
                    raise ConfigurationError(f"{where}: {key}: expected a mapping, found {kind_of(body)}")
                return Entry(body or {}, path.absolute().parent, where)
    raise ConfigurationError(f"{who}: there is no such entry in {section}; there are {_names(files, section)}")
