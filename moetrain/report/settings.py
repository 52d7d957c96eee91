"""A run's configuration as documented YAML, and what differs between several."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from moetrain.config import RunConfig

CONFIG_FILE = "config.yaml"
"""In the output directory: the whole configuration of the run, defaults included."""
ABSENT = "(not there)"


def config_yaml(config: RunConfig, docs: bool = True) -> str:
    """The whole configuration as YAML that `load_config` reads back, each key under its documentation."""
    return "\n".join(_section_lines(config, docs)) + "\n"


def _section_lines(section: BaseModel, docs: bool) -> Iterator[str]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if docs and field.description:
            yield from textwrap.wrap(field.description, 100, initial_indent="# ", subsequent_indent="# ")
        if isinstance(value, BaseModel):
            yield f"{name}:"
            yield from (f"  {line}" for line in _section_lines(value, docs))
        else:
            yield from yaml.safe_dump({name: plain[name]}, sort_keys=False, width=120).splitlines()


def differences(configs: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all configurations, with the value in each.

    Args:
        configs: texts in YAML; one that cannot be read has no keys.

    Returns:
        Dotted keys in the order of the first configuration that has them, each with one value a configuration.
    """
    flat = [dict(_leaves(_mapping(text))) for text in configs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [(key, [values.get(key, ABSENT) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _mapping(text: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return raw if isinstance(raw, dict) else {}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """`(a.b.0.c, text)` of everything that is no mapping and no list of mappings."""
    if isinstance(value, dict) and (value or not key):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)
