"""Optuna's samplers and pruners, by name. Optuna is an optional dependency and is imported only when it is used."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.errors import ConfigError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


class Sampler(NamedTuple):
    """A sampler of optuna.

    Attributes:
        cls: the class in optuna.samplers.
        arguments: further arguments of the class.
        startup: the number of the first trial whose values the sampler may choose. Earlier trials get random values from
            `RuleStudy.ask`; None: all trials do. Trial 0 is always the default config.
        package: the additional package that it needs; empty if there is none.
    """

    cls: str
    arguments: dict[str, Any]
    startup: int | None
    package: str = ""


#: Number of trials after which `tpe` and `gp` begin to use the results, as in optuna by default.
_STARTUP = 10
SAMPLERS = {
    "tpe": Sampler("TPESampler", {"n_startup_trials": _STARTUP}, _STARTUP),
    "random": Sampler("RandomSampler", {}, None),
    "qmc": Sampler("QMCSampler", {"scramble": True, "warn_independent_sampling": False, "warn_asynchronous_seeding": False}, 0),
    "cmaes": Sampler("CmaEsSampler", {"warn_independent_sampling": False}, 0, "cmaes"),
    "gp": Sampler("GPSampler", {"deterministic_objective": True, "n_startup_trials": _STARTUP}, _STARTUP),
}
#: name -> (class in optuna.pruners, its arguments)
PRUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("NopPruner", {}),
    "median": ("MedianPruner", {}),
    "percentile": ("PercentilePruner", {"percentile": 25.0}),
    "successive_halving": ("SuccessiveHalvingPruner", {}),
    "hyperband": ("HyperbandPruner", {}),
}
NO_PRUNER = "none"


def require_optuna(sampler: str) -> None:
    """Refuse to tune if optuna or the package that the sampler needs is not installed.

    Raises:
        ConfigError: if a package is missing; the message says what to install.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tuning needs optuna: pip install optuna")
    package = SAMPLERS[sampler].package
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"sampler={sampler} needs another package: pip install {package}")


def make_sampler(name: str, seed: int) -> BaseSampler:
    """The sampler `name` with this seed."""
    import optuna

    sampler = SAMPLERS[name]
    return _quietly(lambda: getattr(optuna.samplers, sampler.cls)(seed=seed, **sampler.arguments))


def make_pruner(name: str) -> BasePruner:
    """The pruner `name`."""
    import optuna

    cls, arguments = PRUNERS[name]
    return _quietly(lambda: getattr(optuna.pruners, cls)(**arguments))


def _quietly(make: Callable[[], Any]) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make()
