"""Reading YAML that others wrote: plain data of a bounded size, or an error of one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from fa_bench.errors import ConfigError

#: Most bytes of a file, most levels of nesting, and most nodes once every alias is spelled out: far above any real config.
MOST_BYTES, MOST_LEVELS, MOST_NODES = 500_000, 40, 20_000
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge"))


def read_yaml(path: Path) -> Any:
    """A YAML file's content as OmegaConf's container, an empty mapping for an empty file.

    Raises:
        ConfigError: naming the file, and the line where there is one, for what is no plain data, too large or no YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: larger than {MOST_BYTES} bytes: no config")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The same of a text; `source` is what an error calls it."""
    try:
        _check(text, source)
        return OmegaConf.load(io.StringIO(text))
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        said = " ".join((error.problem or error.context or "no YAML").split())
        raise ConfigError(f"{source}{where}: not readable as YAML ({said})") from None
    except Exception as error:  # OmegaConf meets odd content with errors of many kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{source}: not readable as YAML ({said})") from None


def _check(text: str, source: str) -> None:
    """Go through the parser's events, which cost what the text costs, before anything is built from them."""
    sizes: dict[str, int | None] = {}
    #: Of every open collection: its anchor, and the nodes before it.
    open_: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{source}:{event.start_mark.line + 1}"
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in (*_PLAIN, "!"):
            raise ConfigError(f"{where}: tag {tag.replace('tag:yaml.org,2002:', '!!', 1)}: a config is plain data, without tags")
        if isinstance(event, yaml.AliasEvent):
            if (size := sizes.get(event.anchor, 0)) is None:
                raise ConfigError(f"{where}: alias *{event.anchor} stands within what it means")
            nodes += size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, nodes))
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = None
            if len(open_) > MOST_LEVELS:
                raise ConfigError(f"{where}: nested deeper than {MOST_LEVELS} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1 + len(event.value) // 100
        if nodes > MOST_NODES:
            raise ConfigError(f"{where}: more than {MOST_NODES} values, aliases spelled out: no config")
