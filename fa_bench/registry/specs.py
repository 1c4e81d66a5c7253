"""Parses specs, which name a component and may set its options: NAME or NAME:OPTION=VALUE,..."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fa_bench.errors import ConfigError, OptionError
from fa_bench.registry.options import Options
from fa_bench.registry.registry import Registry

T = TypeVar("T", bound=Options)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a spec such as ``resnet18:width=8,blocks=[1,1]``. Values are parsed as YAML.

    Raises:
        ConfigError: for an option without a value, an option without a component's name before it, or options that are not YAML.
    """
    name, _, rest = spec.partition(":")
    if "=" in name:
        raise ConfigError(f"{spec}: write NAME:OPTION=VALUE,OPTION=VALUE; within a list, quote specs that contain commas")
    # Commas within brackets are part of a value.
    words = re.split(r",(?![^\[]*\])", rest) if rest else []
    for word in words:
        if not re.fullmatch(r"[\w.]+=.+", word):
            raise ConfigError(f"{spec}: '{word}' is not OPTION=VALUE; write NAME:OPTION=VALUE,OPTION=VALUE")
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    except (OmegaConfBaseException, YAMLError):
        raise ConfigError(f"{spec}: the options cannot be read; write NAME:OPTION=VALUE,OPTION=VALUE") from None
    assert isinstance(options, dict)
    return name, {str(key): value for key, value in options.items()}


def component(registry: Registry[T], spec: str) -> T:
    """The component that a spec describes.

    Raises:
        ConfigError: for a name that is not registered (with the nearest one), and for the same reasons as `parse_spec`.
        OptionError: for an unknown option or an invalid value.
    """
    name, options = parse_spec(spec)
    cls = registry[name]
    try:
        return cls.from_mapping(options)
    except OptionError as error:
        raise error.with_prefix(name) from None
