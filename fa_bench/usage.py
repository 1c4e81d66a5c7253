"""The text of ``fa-bench --help``, made from the components' own declarations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fa_bench.config import FEEDBACK_OPTIMIZER, RunOptions, conf_dir
from fa_bench.errors import ConfigError
from fa_bench.options import Options, option_fields, range_text
from fa_bench.registries import GROUPS

_HEAD = """\
usage: fa-bench [-m] [key=value ...]

  fa-bench                                    one small real run, no download
  fa-bench algorithm=kp dataset=mnist         one run
  fa-bench -m algorithm=bp,fa,kp seed=0,1,2   a grid, compared at the end
  fa-bench -m experiment=quickstart           a preset grid
  fa-bench --cfg job                          the composed config
  fa-bench --help algorithm=dfa               the options of one choice
  fa-bench --hydra-help                       Hydra's own flags (--multirun, --config-dir, ...)
"""


def usage(overrides: list[str]) -> str:
    """Usage, groups with their choices, and the options of what `overrides` choose, or of all run options without any."""
    chosen = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    lines = [_HEAD, "groups:"]
    for group in GROUPS:
        lines.append(f"  {group.kind}")
        lines += [f"    {name:15s} {_summary(cls)}" for name, cls in group.items()]
    presets = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
    lines += [f"  experiment       presets: {', '.join(presets)}",
              f"  optimizer@{FEEDBACK_OPTIMIZER}   an optimizer of its own for learned feedback", "", "run options:"]
    lines += _options(RunOptions, "")
    for group in GROUPS:
        names = [chosen[group.kind]] if group.kind in chosen else list(group) if not chosen else []
        for name in names:
            if name not in group:
                raise ConfigError(f"{group.kind}={name}: no such {group.kind}")
            lines += ["", f"{group.kind}={name}:", *_options(group[name], f"{group.kind}.")]
    return "\n".join(lines)


def _summary(cls: type[Options]) -> str:
    """The first sentence of a docstring, in one line."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return text if len(text) <= 100 else text[:97].rsplit(" ", 1)[0] + " ..."


def _options(cls: type[Options], prefix: str) -> Iterator[str]:
    for field in option_fields(cls):
        value = getattr(cls(), field.name)
        if isinstance(value, Options):
            yield from _options(type(value), f"{prefix}{field.name}.")
            continue
        limits = [f"one of {', '.join(field.metadata['choices'])}"] if field.metadata["choices"] else []
        limits += [range_text(field.metadata["limits"])] if field.metadata["limits"] else []
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        yield f"  {prefix}{field.name}={shown}"
        yield f"      {field.metadata['help']}{f' ({chr(59).join(limits)})' if limits else ''}"
