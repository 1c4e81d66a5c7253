"""The options of a study, which come from the command line and from an experiment's ``tune`` section."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString
from hydra.errors import HydraException

from fa_bench.command.overrides import MOST_JOBS, count_values, parse
from fa_bench.config.job import TUNE
from fa_bench.errors import ConfigError, OptionError, format_value, names, nearest, truncate
from fa_bench.registry.options import Options, option, option_fields
from fa_bench.tuning.optuna_parts import PRUNERS, SAMPLERS

SPACE = "space"
#: Matches the name of the function at the beginning of search values that are not a plain list.
_FUNCTION = re.compile(r"\s*(tag|interval|range|int|float|choice|sort|shuffle)\(")


@dataclasses.dataclass(eq=False)
class TuneOptions(Options):
    """The options of a study."""

    budget: int = option(20, "trials of each rule; the first one is its default config", minimum=1)
    tune_seeds: int | list[int] = option(
        1, "number of seeds of each trial, chosen above the largest of `seeds`; a list: these seeds", minimum=0
    )
    seeds: list[int] = option([0, 1, 2], "seeds of the final runs", minimum=0)
    final_epochs: int | None = option(None, "epochs of the final runs; null: those of the trials", minimum=1)
    sampler: str = option("tpe", "how optuna proposes values", choices=list(SAMPLERS))
    pruner: str = option("none", "how optuna stops bad trials early", choices=list(PRUNERS))
    study_seed: int = option(0, "seed of the sampler", minimum=0, maximum=2**32 - 1)
    jobs: int = option(
        1, "number of processes, each of which runs one trial at a time; does not change the result", minimum=1, maximum=1024
    )
    keep_checkpoints: bool = option(False, "keep the checkpoints of finished trials (those of the final runs are always kept)")
    name: str | None = option(  # type: ignore[assignment, misc]
        None, "folder of the study in output_dir; null: the name of the experiment (or of dataset and architecture) and '-tune'"
    )

    def check(self) -> None:
        if not self.seeds:
            raise OptionError("seeds", "=[]: name at least one seed")
        for key in ("seeds", "tune_seeds"):
            seeds = getattr(self, key)
            if isinstance(seeds, list) and (repeated := [seed for seed in seeds if seeds.count(seed) > 1]):
                raise OptionError(key, f"={format_value(seeds)}: lists {repeated[0]} twice")
        if self.tune_seeds in (0, []):
            raise OptionError("tune_seeds", f"={format_value(self.tune_seeds)}: a trial needs at least one seed")
        if overlap := sorted({*self.trial_seeds} & {*self.seeds}):
            raise OptionError(
                "tune_seeds",
                f"={format_value(self.tune_seeds)}: seed {overlap[0]} is one of `seeds`; values must "
                "not be chosen with the seeds of the final runs (write "
                f"tune_seeds=[{max(self.seeds) + 1}])",
            )
        if self.name is not None and (not re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]*", self.name) or not self.name.strip(".")):
            raise OptionError(
                "name",
                f"={truncate(self.name, 100)}: use a folder name of letters, digits, '.', '_' and "
                "'-' that does not begin with '-'",
            )

    @property
    def trial_seeds(self) -> list[int]:
        """The seeds of each trial."""
        if isinstance(self.tune_seeds, list):
            return self.tune_seeds
        first = max(self.seeds) + 1
        return list(range(first, first + self.tune_seeds))


OWN_KEYS = tuple(field.name for field in option_fields(TuneOptions))


def parse_override(text: str) -> Override:
    """Parse an override, whose value may be an interval. Other commands do not accept intervals.

    Raises:
        ConfigError: as in `fa_bench.command.overrides.parse`.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError):
        if _FUNCTION.match(text.partition("=")[2]):  # quotes would not help
            raise ConfigError(
                f"cannot read '{truncate(text, 200)}': write a list such as 0.1,0.2, interval(LOW,HIGH), "
                "tag(log,interval(LOW,HIGH)), int(interval(LOW,HIGH)) or range(START,STOP,STEP)"
            ) from None
        return parse(text)  # raises the usual error
    if not (override.is_sweep_override() and override.key_or_group):
        return parse(text)
    if not isinstance(override.value(), IntervalSweep) and count_values(override) > MOST_JOBS:
        raise ConfigError(f"{truncate(text, 200)}: more than {MOST_JOBS} values")
    return override


def plain_value(override: Override) -> Any:
    """The value of an override as plain Python objects; for a sweep, the list of its values."""
    value = list(override.sweep_iterator()) if override.is_sweep_override() else override.value()

    def plain(value: Any) -> Any:
        if isinstance(value, QuotedString):
            return value.text
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(value)


def own_options(section: Mapping[str, Any], overrides: list[Override]) -> TuneOptions:
    """The options of a study from an experiment's section and the command line, which takes precedence.

    Raises:
        ConfigError: for an unknown key of the section, or an override that adds, deletes or searches an option of the study.
        OptionError: for an invalid value.
    """
    values = {key: value for key, value in section.items() if key != SPACE}
    for key in values:
        if key not in OWN_KEYS:
            allowed = [*OWN_KEYS, SPACE]
            raise ConfigError(
                f"{TUNE}.{truncate(str(key), 100)}: unknown key{nearest(str(key), allowed)} (allowed: {names(allowed)})"
            )
    for override in overrides:
        if override.is_add() or override.is_delete():
            raise ConfigError(f"{truncate(override.input_line or '', 100)}: write {override.key_or_group}=VALUE")
        if isinstance(override.value(), IntervalSweep):
            raise ConfigError(
                f"{truncate(override.input_line or '', 100)}: {override.key_or_group} is an option of the study, "
                "which is not searched; write its value"
            )
        values[override.key_or_group] = plain_value(override)
    for key in ("seeds", "tune_seeds"):
        if isinstance(value := values.get(key, 0), (str, bool, float)) or value is None:
            raise OptionError(key, f"={truncate(format_value(value), 100)}: write seeds, such as {key}=3 or {key}=[3,4]")
    if isinstance(values.get("seeds"), int) and not isinstance(values["seeds"], bool):
        values["seeds"] = [values["seeds"]]
    if isinstance(values.get("name"), (int, float)):
        values["name"] = str(values["name"])
    return TuneOptions.from_mapping(values)
