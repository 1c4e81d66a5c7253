"""Read untrusted YAML, which must be plain data of a bounded size. Any other input raises an error with a one-line message."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from fa_bench.errors import ConfigError, first_line

#: Limits, far above any real config, on the bytes of a file, the nesting depth, and the number of nodes after aliases are
#: expanded.
MAX_BYTES, MAX_DEPTH, MAX_NODES = 500_000, 40, 20_000
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge"))

#: The parser of libyaml is used if PyYAML includes it, which saves a third of the time needed to read the configs of many runs.
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as an OmegaConf container; an empty mapping for an empty file.

    Raises:
        ConfigError: if the file is unreadable, too large, not YAML or not plain data; the message names it, and the line if
            known.
    """
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        ConfigError: if the file is unreadable, too large or not UTF-8; the message names it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text with the same checks as `read_yaml`, except that of the size. Error messages refer to the text as
    `source`."""
    return copy.deepcopy(_parse(text, source))


@functools.lru_cache(maxsize=256)  # every job of a sweep is composed from the same files
def _parse(text: str, source: str) -> Any:
    try:
        try:
            _check(text, source, _FAST)
        except (ConfigError, yaml.YAMLError):  # PyYAML's Python parser names the line more precisely than libyaml
            _check(text, source, yaml.SafeLoader)
        return OmegaConf.load(io.StringIO(text))
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "not YAML").split())
        raise ConfigError(f"{source}{where}: invalid YAML ({problem})") from None
    except Exception as error:  # OmegaConf raises many types of errors for odd content
        raise ConfigError(f"{source}: invalid YAML ({first_line(error)})") from None


def _check(text: str, source: str, loader: Any) -> None:
    """Check the parser's events before anything is built from them, because the events take time and memory only in proportion to
    the text."""
    sizes: dict[str, int | None] = {}
    #: The anchor of every open collection, and the number of nodes before the collection.
    open_collections: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, Loader=loader):
        where = f"{source}:{event.start_mark.line + 1}"
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in (*_PLAIN, "!"):
            raise ConfigError(f"{where}: tag {tag.replace('tag:yaml.org,2002:', '!!', 1)}: not allowed, a config is plain data")
        if isinstance(event, yaml.AliasEvent):
            if (size := sizes.get(event.anchor, 0)) is None:
                raise ConfigError(f"{where}: alias *{event.anchor} refers to a value that contains it")
            nodes += size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, nodes))
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = None
            if len(open_collections) > MAX_DEPTH:
                raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_collections.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1 + len(event.value) // 100
        if nodes > MAX_NODES:
            raise ConfigError(f"{where}: more than {MAX_NODES} values after expanding aliases")
