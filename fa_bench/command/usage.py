"""The text of ``fa-bench --help``, generated from the declarations of the components."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa_bench.command.compose import Composer
from fa_bench.config.job import FEEDBACK_OPTIMIZER, RunOptions, conf_dir
from fa_bench.errors import ConfigError, OptionError, format_value, names, nearest, truncate
from fa_bench.registry.options import Options, defaults, limits_text, option_fields, summary
from fa_bench.registry.registries import GROUPS, NAMED, SCHEDULES

if TYPE_CHECKING:
    from fa_bench.registry.registry import Registry

_HEAD = """\
usage: fa-bench [-m] [key=value ...]

  fa-bench                                    one small run, no download
  fa-bench algorithm=kp dataset=mnist         one run
  fa-bench -m algorithm=bp,fa,kp seed=0,1,2   a sweep, with a report at the end
  fa-bench -m experiment=quickstart           an experiment: a sweep with its settings
  fa-bench --dry-run algorithm=kp             show what would run: model, feedback, memory, arithmetic; also with -m
  fa-bench --cfg job                          the composed config
"""
_MORE = """\
more:
  fa-bench --help algorithm                   the choices of a group
  fa-bench --help algorithm=dfa               the options of a choice
  fa-bench --help run                         all run options
  fa-bench --help schedule                    schedules with their options; also: metric, probe, callback, logger
  fa-bench --help plugins=[my_rules] ...      include the components that your module registers
  fa-bench --hydra-help                       Hydra's own flags (--multirun, --config-dir, ...)
"""
#: The run options that the overview lists.
_COMMON = ("seed", "epochs", "batch_size", "device", "data_dir", "output_dir", "scale", "resume")
_WIDTH = 100
#: The key that chooses the optimizer of learned feedback.
_FEEDBACK = f"optimizer@{FEEDBACK_OPTIMIZER}"


def usage(composer: Composer, topics: Sequence[str]) -> str:
    """The help text on each topic, such as a group or ``run``, and on each choice of the command line. If there are no topics and
    no choices, the text is an overview.

    The components of plugins are included, and so are the configs in a user's folder.

    Raises:
        ConfigError: for an unknown topic or choice.
    """
    choices, chosen = composer.choices(), composer.chosen()
    kinds, named = ({registry.kind: registry for registry in registries} for registries in (GROUPS, NAMED))
    sections = []
    for topic in topics:
        if topic not in (known := [*kinds, "experiment", "run", *named]):
            similar = "; --help run lists it" if topic in defaults(RunOptions) else nearest(topic, known)
            raise ConfigError(f"--help {truncate(topic, 100)}: no such topic{similar} (allowed: {names(known)})")
        sections.append(
            ["run options:", *_options(RunOptions(), "")]
            if topic == "run"
            else [f"{topic}:", *(_components(named[topic]) if topic in named else _choices(composer, topic, choices[topic]))]
        )
    for name in chosen.get("experiment", ()):
        if _experiment_file(composer, name) is None:
            raise ConfigError(f"experiment={name}: no such experiment{nearest(name, choices['experiment'])}")
        sections.append(
            [f"experiment={name}:", *textwrap.wrap(_comment(composer, name), _WIDTH, initial_indent="  ", subsequent_indent="  ")]
        )
    optimizers = kinds["optimizer"]
    for key, kind, group in (
        *((kind, kind, group) for kind, group in kinds.items()),
        (_FEEDBACK, FEEDBACK_OPTIMIZER, optimizers),
    ):
        for name in chosen.get(key, ()):
            # A choice that is not a component is a config that sets one up, so its values are shown instead of the defaults.
            values = {"name": name} if name in group else composer.component(group.kind, name)
            component = group[values.pop("name")]
            title = f"{key}={name}" + (f" ({component.name})" if component.name != name else "")
            try:
                options = component.from_mapping(values)
            except OptionError as error:
                raise error.with_prefix(kind) from None
            sections.append([f"{title}: {summary(component)}", *_options(options, f"{kind}.")])
    for kind, registry in named.items():
        for name in chosen.get(kind, ()):
            sections.append([f"{kind}={name}: {summary(registry[name])}", *_own_options(registry, name)])
    return "\n\n".join("\n".join(section) for section in sections) if sections else _page(choices)


def _page(choices: dict[str, list[str]]) -> str:
    lines = [_HEAD, "groups:"]
    for kind in (*(group.kind for group in GROUPS), "experiment"):
        lines += textwrap.wrap(
            ", ".join(sorted(choices[kind])), _WIDTH, initial_indent=f"  {kind:14s}", subsequent_indent=" " * 16
        )
    lines += [f"  {_FEEDBACK}=...  a separate optimizer for learned feedback", "", "common options:"]
    fields = {field.name: field for field in option_fields(RunOptions)}
    defaults = RunOptions()
    for name in _COMMON:
        text = textwrap.shorten(fields[name].metadata["help"], 80, placeholder=" ...")
        lines.append(f"  {f'{name}={format_value(getattr(defaults, name))}':22s}{text}")
    lines += [f"  {'optimizer.lr=0.05':22s}learning rate; options of components are GROUP.OPTION=VALUE", "", _MORE]
    return "\n".join(lines).rstrip()


def _choices(composer: Composer, kind: str, choices: Sequence[str]) -> Iterator[str]:
    """The choices of a group, one per line."""
    group = next((group for group in GROUPS if group.kind == kind), {})
    width = max(17, *map(len, choices))
    for name in sorted(choices):
        text = (
            _comment(composer, name)
            if kind == "experiment"
            else summary(group[name])
            if name in group
            else f"from {composer.config_dir}"
        )
        yield f"  {name:{width}s} {textwrap.shorten(text, _WIDTH, placeholder=' ...')}"


def _components(registry: Registry) -> Iterator[str]:
    """The components of a registry that is not a config group, with their options."""
    if not registry:
        yield "  none registered; pass plugins=[MODULE] to include those of a module"
    for name, cls in registry.items():
        yield f"  {name:22s} {textwrap.shorten(summary(cls), _WIDTH, placeholder=' ...')}"
        yield from _own_options(registry, name)


def _own_options(registry: Registry, name: str) -> Iterator[str]:
    """The options of a component that is selected by an option. Options of schedules have their own keys; options of other
    components are written after the component's name."""
    prefix = "optimizer.schedule." if registry is SCHEDULES else f"{name}:"
    for field in option_fields(registry[name]):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield f"      {prefix}{field.name}={format_value(default)}  {_help(field)}"


def _comment(composer: Composer, name: str) -> str:
    """The comment at the top of an experiment's file, as one line."""
    path = _experiment_file(composer, name)
    head = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8", errors="replace")) if path else None
    lines = head.group(0).splitlines() if head else []
    return " ".join(line.lstrip("# ") for line in lines if "@package" not in line)


def _experiment_file(composer: Composer, name: str) -> Path | None:
    """The file of an experiment, or None if there is no such experiment. A user's file replaces the shipped one."""
    folders = [*([composer.config_dir] if composer.config_dir else []), conf_dir()]
    return next((path for folder in folders if (path := folder / "experiment" / f"{name}.yaml").is_file()), None)


def _options(options: Options, prefix: str) -> Iterator[str]:
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            yield from _options(value, f"{prefix}{field.name}.")
            continue
        yield f"  {prefix}{field.name}={format_value(value)}"
        yield f"      {_help(field)}"


def _help(field: dataclasses.Field[Any]) -> str:
    limits = limits_text(field)
    return f"{field.metadata['help']}{f' ({limits})' if limits else ''}"
