"""The text of ``fa-bench --help``, made from the components' own declarations: a page, a group's choices, a choice's options."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fa_bench.command.compose import Composer
from fa_bench.config.job import FEEDBACK_OPTIMIZER, RunOptions, conf_dir
from fa_bench.errors import ConfigError, format_value, names, nearest, truncate
from fa_bench.registry.options import Options, limits_text, option_fields, summary
from fa_bench.registry.registries import GROUPS, NAMED, SCHEDULES

if TYPE_CHECKING:
    from fa_bench.registry.registry import Registry

_HEAD = """\
usage: fa-bench [-m] [key=value ...]

  fa-bench                                    one small run, no download
  fa-bench algorithm=kp dataset=mnist         one run
  fa-bench -m algorithm=bp,fa,kp seed=0,1,2   a sweep, with a report at the end
  fa-bench -m experiment=quickstart           an experiment: a sweep with its settings
  fa-bench --dry-run algorithm=kp             what would run: model, feedback, memory, arithmetic; also with -m
  fa-bench --cfg job                          the composed config
"""
_MORE = """\
more:
  fa-bench --help algorithm                   the choices of a group, a line each
  fa-bench --help algorithm=dfa               the options of a choice
  fa-bench --help run                         all run options
  fa-bench --help schedule                    what an option names; also metric, probe, callback, logger
  fa-bench --help plugins=[my_rules] ...      the same with what a module of yours registers
  fa-bench --hydra-help                       Hydra's own flags (--multirun, --config-dir, ...)
"""
#: What is changed most often, of the run and of the usual optimizer.
_USED = ("seed", "epochs", "batch_size", "device", "data_dir", "output_dir", "scale", "resume")
_WIDTH = 100


def usage(composer: Composer, topics: Sequence[str]) -> str:
    """Help on each topic, a group or ``run``, and on what the command line chooses; a page on everything where there is none.

    What plugins and a folder of the user's own bring along is listed like the rest.

    Raises:
        ConfigError: for an unknown topic or choice.
    """
    choices, chosen = composer.choices(), composer.chosen()
    kinds, named = ({registry.kind: registry for registry in registries} for registries in (GROUPS, NAMED))
    sections = []
    for topic in topics:
        if topic not in (known := [*kinds, "experiment", "run", *named]):
            raise ConfigError(f"--help {truncate(topic, 100)}: no such topic{nearest(topic, known)} (allowed: {names(known)})")
        sections.append(["run options:", *_options(RunOptions(), "")] if topic == "run" else
                        [f"{topic}:", *(_named(named[topic]) if topic in named else _lines(composer, topic, choices[topic]))])
    for name in chosen.get("experiment", ()):
        if name not in choices["experiment"]:
            raise ConfigError(f"experiment={name}: no such experiment{nearest(name, choices['experiment'])}")
        sections.append([f"experiment={name}:", *textwrap.wrap(_comment(composer, name), _WIDTH, initial_indent="  ",
                                                              subsequent_indent="  ")])
    for kind, group in kinds.items():
        for name in chosen.get(kind, ()):
            # A choice that is no component is a folder's that sets one up: its values are shown instead of the defaults.
            values = {"name": name} if name in group else composer.component(kind, name)
            component = group[values.pop("name")]
            title = f"{kind}={name}" + (f" ({component.name})" if component.name != name else "")
            sections.append([f"{title}: {summary(component)}", *_options(component.from_mapping(values), f"{kind}.")])
    return "\n\n".join("\n".join(section) for section in sections) if sections else _page(choices)


def _page(choices: dict[str, list[str]]) -> str:
    lines = [_HEAD, "groups:"]
    for kind in (*(group.kind for group in GROUPS), "experiment"):
        lines += textwrap.wrap(", ".join(sorted(choices[kind])), _WIDTH, initial_indent=f"  {kind:14s}",
                               subsequent_indent=" " * 16)
    lines += [f"  optimizer@{FEEDBACK_OPTIMIZER}=...  a separate optimizer for learned feedback", "", "options used most:"]
    fields = {field.name: field for field in option_fields(RunOptions)}
    defaults = RunOptions()
    for name in _USED:
        said = textwrap.shorten(fields[name].metadata["help"], 80, placeholder=" ...")
        lines.append(f"  {f'{name}={format_value(getattr(defaults, name))}':22s}{said}")
    lines += [f"  {'optimizer.lr=0.05':22s}learning rate; every component's options are NAME.OPTION=VALUE", "", _MORE]
    return "\n".join(lines).rstrip()


def _lines(composer: Composer, kind: str, choices: Sequence[str]) -> Iterator[str]:
    """The choices of a group, a line each."""
    group = next((group for group in GROUPS if group.kind == kind), {})
    for name in sorted(choices):
        said = _comment(composer, name) if kind == "experiment" else summary(group[name]) if name in group else \
            f"of {composer.config_dir}"
        yield f"  {name:17s} {said if len(said) <= _WIDTH else textwrap.shorten(said, _WIDTH, placeholder=' ...')}"


def _named(registry: Registry) -> Iterator[str]:
    """The components of a table that options name, a line each, and the options that they have."""
    prefix = "optimizer.schedule." if registry is SCHEDULES else ""
    for name, cls in registry.items():
        yield f"  {name:22s} {textwrap.shorten(summary(cls), _WIDTH, placeholder=' ...')}"
        for field in option_fields(cls):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            limits = limits_text(field)
            text = f"{field.metadata['help']}{f' ({limits})' if limits else ''}"
            yield f"      {prefix}{field.name}={format_value(default)}  {text}"


def _comment(composer: Composer, name: str) -> str:
    """The comment at the head of an experiment's file, in one line."""
    folders = [conf_dir(), *([composer.config_dir] if composer.config_dir else [])]
    path = next(path for folder in folders if (path := folder / "experiment" / f"{name}.yaml").is_file())
    head = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8", errors="replace"))
    lines = head.group(0).splitlines() if head else []
    return " ".join(line.lstrip("# ") for line in lines if "@package" not in line)


def _options(options: Options, prefix: str) -> Iterator[str]:
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            yield from _options(value, f"{prefix}{field.name}.")
            continue
        limits = limits_text(field)
        yield f"  {prefix}{field.name}={format_value(value)}"
        yield f"      {field.metadata['help']}{f' ({limits})' if limits else ''}"
