"""The plan of a study: its rules with their default configs and search spaces, checked before the first trial."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fa_bench.command.compose import Composer
from fa_bench.command.fit import check_fit
from fa_bench.command.overrides import parse
from fa_bench.config.job import GRID, RULES, TUNE, VOLATILE, Job, RunOptions
from fa_bench.config.labels import flatten
from fa_bench.errors import ConfigError, OptionError, format_value, names, nearest, truncate
from fa_bench.objectives.scores import Score
from fa_bench.registry.options import option_fields
from fa_bench.registry.registries import ALGORITHMS, GROUPS
from fa_bench.tuning.options import OWN_KEYS, SPACE, TuneOptions, own_options, parse_override
from fa_bench.tuning.space import Dimension, as_typed, declared, dimension, value_at
from fa_bench.utils.files import check_writable, refuse_root

ALGORITHM, SEED, OUTPUT = "algorithm", "seed", "output_dir"
#: Keys that cannot be searched. The only key of a dataset that can be searched is that of augmentation, because it affects only
#: the training images.
_SAME = ("epochs", "scale", "device", *VOLATILE)
_AUGMENTATION = ("dataset.augment",)
#: Name of the folder, within the study's folder, that contains the runs of the trials.
TRIALS = "trials"


@dataclasses.dataclass
class RulePlan:
    """One rule of a study.

    Attributes:
        rule: the rule's name.
        overrides: the rule's default config as overrides, without the seed.
        space: the dimensions of the search space, by key.
        default: the values of these keys in the default config.
        job: the default config with the first seed of the trials.
    """

    rule: str
    overrides: list[str]
    space: dict[str, Dimension]
    default: dict[str, Any]
    job: Job


@dataclasses.dataclass
class Plan:
    """A checked study.

    Attributes:
        options: the study's own options.
        composer: composes the trials' configs.
        rules: the rules, in the order of the command line.
        directory: the study's folder.
        experiment: the experiment that the configs come from, if any.
    """

    options: TuneOptions
    composer: Composer
    rules: list[RulePlan]
    directory: Path
    experiment: str | None

    @property
    def score(self) -> Score:
        """The validation score by which trials are compared."""
        return self.rules[0].job.scores[0]

    @property
    def epochs(self) -> int:
        """Epochs of each trial."""
        return self.rules[0].job.run.epochs

    def trial(self, plan: RulePlan, values: Mapping[str, Any], seed: int) -> tuple[Job, Path]:
        """The checked config of one trial with one seed, and the run's directory within the study's folder.

        Raises:
            FaBenchError: if the config cannot be run.
        """
        [(job, run_dir)] = self.composer.check([self._overrides(plan, values, seed)])
        return job, run_dir

    def _overrides(self, plan: RulePlan, values: Mapping[str, Any], seed: int) -> list[str]:
        chosen = {
            **{key: as_typed(value) for key, value in values.items()},
            SEED: str(seed),
            OUTPUT: as_typed(str(self.directory / TRIALS)),
        }
        kept = [text for text in plan.overrides if parse(text).key_or_group not in chosen]
        return [*kept, *(f"{key}={text}" for key, text in chosen.items())]


def make_plan(overrides: Sequence[str], config_dir: str | None, config_name: str = "config") -> Plan:
    """Read and check a study without writing or training anything.

    Args:
        overrides: the overrides of the command line, with the study's own keys.
        config_dir: a user's folder of configs, or None.
        config_name: the primary config.

    Raises:
        FaBenchError: for invalid input, naming the key.
    """
    parsed = [parse_override(text) for text in overrides]
    own = [override for override in parsed if override.key_or_group in OWN_KEYS]
    swept = [override for override in parsed if override.key_or_group not in OWN_KEYS and _is_dimension(override)]
    of_rules = [override for override in parsed if override.key_or_group.startswith(f"{ALGORITHM}.") and override not in swept]
    others = [override for override in parsed if not any(override is other for other in (*own, *swept, *of_rules))]
    _refuse(others)
    composer = Composer(config_name, config_dir, [_text(override) for override in others])
    _known([*others, *swept], composer.choices())
    config = composer.compose(mode=RunMode.MULTIRUN)
    section = _section(config)
    options = own_options(section, own)
    seed = options.trial_seeds[0]
    experiment = config.hydra.runtime.choices.get("experiment")
    composer = Composer(config_name, config_dir, [*composer.overrides, f"{SEED}={seed}"], composer.loader)
    from_file, swept_in_file = _space_of_file(section, experiment)
    _searchable([*swept, *swept_in_file])
    configs = _by_rule(composer.expand(multirun=True), str(config.hydra.runtime.choices[ALGORITHM]), experiment)
    for name in configs:
        configs[name] += _of_rule(name, [*from_file, *of_rules])
    _used_somewhere([*from_file, *of_rules, *swept_in_file, *swept], configs)
    fixed = {override.key_or_group for override in [*from_file, *others, *of_rules]}
    composer = Composer(config_name, config_dir, _without_sweeps(composer), composer.loader)
    found: list[RulePlan] = []
    for name, texts in configs.items():
        [(job, _)] = composer.check([texts], directories=False)
        space = {
            **declared("optimizer", type(job.optimizer).search_space, f"optimizer={job.optimizer.name}"),
            **declared(ALGORITHM, type(job.algorithm).search_space, f"algorithm={name}"),
        }
        space = {key: each for key, each in space.items() if key not in fixed}
        typed = {
            override.key_or_group: dimension(override.key_or_group, override, source)
            for source, given in ((f"experiment={experiment}", swept_in_file), ("the command line", swept))
            for override in _of_rule_or_common(name, given)
        }
        space |= {key: each for key, each in typed.items() if key not in {_key(override) for override in of_rules}}
        if not space:
            raise ConfigError(f"algorithm={name}: nothing to search, since every key of its space has a single value")
        found.append(
            RulePlan(name, [text for text in texts if parse(text).key_or_group != SEED], space, _defaults(job, space), job)
        )
    plan = Plan(options, composer, found, _directory(options, found[0].job, experiment), experiment)
    _check(plan)
    return plan


def _is_dimension(override: Override) -> bool:
    """Whether an override is a sweep that a study searches: one over values of an option, not over components or seeds."""
    key = override.key_or_group
    return (
        override.is_sweep_override()
        and key not in (ALGORITHM, SEED, "experiment")
        and "@" not in key
        and key not in [group.kind for group in GROUPS]
        and not override.is_hydra_override()
    )


def _refuse(overrides: Sequence[Override]) -> None:
    """Refuse keys that a study sets itself, and sweeps over components other than rules."""
    for override in overrides:
        key, typed = override.key_or_group, truncate(override.input_line or "", 200)
        if key == ALGORITHM and isinstance(value := override.value(), list):
            raise ConfigError(f"{typed}: write {ALGORITHM}={','.join(map(str, value))} to tune several rules")
        if key.startswith(f"{TUNE}.") and key.partition(".")[2] in OWN_KEYS:
            raise ConfigError(f"{typed}: on the command line, write {key.partition('.')[2]}=VALUE")
        if key == SEED:
            raise ConfigError(
                f"{typed}: a study has two sets of seeds; write tune_seeds=... (of the trials) and seeds=... (of the final runs)"
            )
        if override.is_sweep_override() and key != ALGORITHM:
            raise ConfigError(f"{typed}: a study compares rules on one task; start one study for each {key}")
        if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
            raise ConfigError(f"{typed}: a study chooses the directories of its runs; write output_dir=FOLDER name=NAME")


def _known(overrides: Sequence[Override], groups: Collection[str]) -> None:
    """Refuse unknown keys without a dot, which could be misspelled keys of fa-bench or of the study."""
    known = [*OWN_KEYS, *(field.name for field in option_fields(RunOptions)), *groups, "experiment", GRID, RULES, TUNE]
    for override in overrides:
        key = override.key_or_group
        if not override.is_add() and not re.search(r"[.@/]", key) and key not in known:
            raise ConfigError(
                f"{truncate(key, 100)}: unknown key{nearest(key, known)} (keys of a study: {names(OWN_KEYS)}; "
                "others are those of fa-bench)"
            )


def _searchable(overrides: Sequence[Override]) -> None:
    """Refuse to search keys that must be equal for all trials or that do not affect results."""
    for override in overrides:
        key = _key(override)
        # Scores on different data cannot be compared.
        if override.is_add() or override.is_delete() or key in _SAME or (key.startswith("dataset.") and key not in _AUGMENTATION):
            raise ConfigError(f"{truncate(_text(override), 200)}: {key} cannot be searched; it is the same for all trials")


def _section(config: Any) -> dict[str, Any]:
    """The experiment's ``tune`` section as plain containers; empty if there is no such section."""
    section = config.get(TUNE)
    plain = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise ConfigError(f"{TUNE}={truncate(str(plain), 100)}: must be a mapping of options, such as {{budget: 20}}")
    if not isinstance(plain.get(SPACE) or {}, dict):
        raise ConfigError(f"{TUNE}.{SPACE}={truncate(str(plain[SPACE]), 100)}: must map keys to values as on the command line")
    return {str(key): value for key, value in plain.items()}


def _space_of_file(section: Mapping[str, Any], experiment: Any) -> tuple[list[Override], list[Override]]:
    """The single values and the dimensions that an experiment's ``tune`` section lists."""
    overrides = []
    for key, value in (section.get(SPACE) or {}).items():
        text = ",".join(map(as_typed, value)) if isinstance(value, list) else format_value(value)
        try:
            overrides.append(parse_override(f"{key}={text}"))
        except ConfigError as error:
            raise ConfigError(f"experiment={experiment}: {TUNE}.{SPACE}: {error}") from None
    for override in overrides:
        if override.is_sweep_override() and not _is_dimension(override):
            raise ConfigError(
                f"experiment={experiment}: {TUNE}.{SPACE}.{_key(override)}: only values can be searched, not "
                "components; start one study for each"
            )
    return (
        [override for override in overrides if not override.is_sweep_override()],
        [override for override in overrides if override.is_sweep_override()],
    )


def _by_rule(jobs: Sequence[list[str]], default_rule: str, experiment: Any) -> dict[str, list[str]]:
    """The overrides of every rule's default config; jobs that do not name a rule use the default rule.

    Raises:
        ConfigError: if an experiment has several configs of one rule.
    """
    configs: dict[str, list[str]] = {}
    for job in jobs:
        rule = next((text.partition("=")[2] for text in job if text.startswith(f"{ALGORITHM}=")), default_rule)
        other = configs.setdefault(rule, job)
        if different := sorted({*other} ^ {*job}):
            key = different[0].partition("=")[0]
            raise ConfigError(
                f"experiment={experiment}: its {GRID} has several values of {key} for {rule}, but a study tunes "
                f"one config of each rule; choose one of them ({names(different)})"
            )
    return configs


def _of_rule(name: str, overrides: Sequence[Override]) -> list[str]:
    return [_text(override) for override in _of_rule_or_common(name, overrides)]


def _of_rule_or_common(name: str, overrides: Sequence[Override]) -> list[Override]:
    """The overrides that apply to the rule. An override of a rule's option applies only to the rules that have this option."""
    options = [field.name for field in option_fields(ALGORITHMS[name])] if name in ALGORITHMS else None
    return [
        override
        for override in overrides
        if options is None or not _key(override).startswith(f"{ALGORITHM}.") or _key(override).split(".")[1] in options
    ]


def _used_somewhere(overrides: Sequence[Override], configs: Mapping[str, list[str]]) -> None:
    for override in overrides:
        if not any(_of_rule_or_common(name, [override]) for name in configs):
            raise ConfigError(
                f"{truncate(_text(override), 200)}: no rule of this study has this option (rules: {names(configs)})"
            )


def _without_sweeps(composer: Composer) -> list[str]:
    return [text for text in composer.overrides if not parse(text).is_sweep_override()]


def _defaults(job: Job, space: Mapping[str, Dimension]) -> dict[str, Any]:
    values = {}
    for key, each in space.items():
        try:
            values[key] = value_at(job, key)
        except (KeyError, TypeError):
            raise ConfigError(
                f"{key}={each.text}: {job.algorithm.name} with {job.optimizer.name} has no option {key}"
                f"{nearest(key, flatten(job.plain()))}"
            ) from None
    return values


def _directory(options: TuneOptions, job: Job, experiment: Any) -> Path:
    task = experiment if isinstance(experiment, str) else f"{job.dataset.name}-{job.architecture.name}"
    return Path(job.run.output_dir, options.name or f"{task}-tune")


def _check(plan: Plan) -> None:
    """Check the default config of each rule, the extremes of its search space, and the study's folder.

    Raises:
        FaBenchError: if one of them cannot be used; the message names the key.
    """
    refuse_root(plan.directory, OUTPUT)
    check_writable(plan.directory)
    if len(epochs := {each.job.run.epochs for each in plan.rules}) > 1:
        raise ConfigError(
            f"epochs: the rules differ ({names(sorted(epochs))}), but every rule gets the same number; pass epochs=N"
        )
    if len(scores := {each.job.scores[0].title for each in plan.rules}) > 1:
        raise ConfigError(
            f"objective: the rules have different scores ({names(sorted(scores))}) and cannot be compared; use one objective"
        )
    seed = plan.options.trial_seeds[0]
    for each in plan.rules:
        if getattr(each.job.dataset, "validation", None) == 0:
            raise OptionError(
                "dataset.validation",
                f"=0: trials are compared by their validation {each.job.scores[0].title}; "
                "hold out samples with dataset.validation=0.1",
            )
        for one in each.space.values():
            for value in one.extremes():
                try:
                    Job.from_config(_with_value(each.job, one.key, value))
                except OptionError as error:
                    raise ConfigError(f"{error} (searched as {one.key}={one.text}, by {one.source}{_whole(one, each)})") from None
        plan.trial(each, {key: one.extremes()[-1] for key, one in each.space.items()}, seed)
    check_fit(each.job for each in plan.rules)


def _whole(one: Dimension, plan: RulePlan) -> str:
    """A hint on how to write a range of whole numbers. The hint is empty unless the option takes whole numbers and the range
    includes other numbers."""
    is_range = not one.choices and one.step is None and not isinstance(one.low, int)
    if not is_range or type(plan.default[one.key]) is not int:
        return ""
    return f"; write {dataclasses.replace(one, low=math.ceil(one.low), high=math.floor(one.high)).text} for whole numbers"


def _with_value(job: Job, key: str, value: Any) -> DictConfig:
    config = OmegaConf.create(job.plain())
    OmegaConf.update(config, key, value)
    return config


def describe(plan: Plan) -> str:
    """A description of what a study will do, for the terminal."""
    options, count = plan.options, len(plan.rules)
    finals = count * len(options.seeds)
    lines = [
        f"Tuning {count} rule{'s' * (count > 1)}: {options.budget * count} trials ({options.budget} of each) of "
        f"{plan.epochs} epoch{'s' * (plan.epochs > 1)}, with seed{'s' * (len(options.trial_seeds) > 1)} "
        f"{names(options.trial_seeds)}; then {finals} final run{'s' * (finals > 1)}, with seed"
        f"{'s' * (len(options.seeds) > 1)} {names(options.seeds)}; output: {plan.directory}",
        f"  sampler: {options.sampler}, seed {options.study_seed}; pruner: {options.pruner}",
    ]
    common = [
        key for key in plan.rules[0].space if len({each.space[key].text if key in each.space else "" for each in plan.rules}) == 1
    ]
    lines += [f"  {key}: {plan.rules[0].space[key].text}" for key in common]
    for each in plan.rules:
        lines += [f"  {each.rule}: {key}: {one.text}" for key, one in each.space.items() if key not in common]
    return "\n".join(lines)


def _key(override: Override) -> str:
    return override.key_or_group


def _text(override: Override) -> str:
    return override.input_line or ""
