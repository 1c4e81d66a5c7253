"""The text of ``fa-bench --help``, made from the components' own declarations."""

from __future__ import annotations

from collections.abc import Iterator

from fa_bench.command.compose import Composer
from fa_bench.config.job import FEEDBACK_OPTIMIZER, RunOptions
from fa_bench.config.options import Options, limits_text, option_fields, summary, value_text
from fa_bench.config.registries import GROUPS

_HEAD = """\
usage: fa-bench [-m] [key=value ...]

  fa-bench                                    one small real run, no download
  fa-bench algorithm=kp dataset=mnist         one run
  fa-bench -m algorithm=bp,fa,kp seed=0,1,2   a grid, compared at the end
  fa-bench -m experiment=quickstart           a preset grid
  fa-bench --dry-run algorithm=kp             what it would run: model, feedback, memory, arithmetic; also with -m
  fa-bench --cfg job                          the composed config
  fa-bench --help algorithm=dfa               the options of one choice; also of a plugin's, with its plugins=[...]
  fa-bench --hydra-help                       Hydra's own flags (--multirun, --config-dir, ...)
"""


def usage(composer: Composer) -> str:
    """Usage, groups with their choices, and the options of what the command line chooses, or of everything.

    What plugins and a folder of the user's own bring along is listed like the rest.
    """
    choices, chosen = composer.choices(), composer.chosen()
    lines = [_HEAD, "groups:"]
    for group in GROUPS:
        lines.append(f"  {group.kind}")
        lines += [f"    {name:17s} {summary(group[name]) if name in group else f'of {composer.config_dir}'}"
                  for name in sorted({*choices[group.kind], *group})]
    lines += [f"  experiment       presets: {', '.join(choices['experiment'])}",
              f"  optimizer@{FEEDBACK_OPTIMIZER}   an optimizer of its own for learned feedback", "", "run options:"]
    lines += _options(RunOptions(), "")
    everything = not any(group.kind in chosen for group in GROUPS)
    for group in GROUPS:
        for name in chosen.get(group.kind, list(group) if everything else []):
            # What is no component itself is a folder's choice that sets one up: its values are shown in place of the defaults.
            values = {"name": name} if name in group else composer.component(group.kind, name)
            component = group[values.pop("name")]
            title = f"{group.kind}={name}" + (f" ({component.name})" if component.name != name else "")
            lines += ["", f"{title}:", *_options(component.from_mapping(values), f"{group.kind}.")]
    return "\n".join(lines)


def _options(options: Options, prefix: str) -> Iterator[str]:
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            yield from _options(value, f"{prefix}{field.name}.")
            continue
        limits = limits_text(field)
        yield f"  {prefix}{field.name}={value_text(value)}"
        yield f"      {field.metadata['help']}{f' ({limits})' if limits else ''}"
