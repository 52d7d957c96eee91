"""What Grafana's own types, as grafana-foundation-sdk has them, say against a value in JSON.

Its generator makes them and Grafana's JSON schemas from the same definitions. Reading a value by them checks little: an
unknown key is left out and a wrong type is taken as it is. Here each key, type, choice and required key counts.
"""

from __future__ import annotations

import inspect
import re
import sys
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grafana_foundation_sdk.cog.variants import Dataquery as AnyDataquery
from grafana_foundation_sdk.models.prometheus import Dataquery

PLAIN = {str: str, bool: bool, int: int, float: (int, float), NoneType: NoneType}


def problems(value: Any, of: Any, place: str = "") -> list[str]:
    """Where `value` is not `of`, a type of the library: places and what is wrong there."""
    of = Dataquery if of is AnyDataquery else of
    origin, arguments = get_origin(of), get_args(of)
    if of in (object, Any):
        return []
    if origin in (Union, UnionType):
        return min((problems(value, one, place) for one in arguments), key=len)
    if origin is list and isinstance(value, list):
        return [found for i, item in enumerate(value) for found in problems(item, arguments[0], f"{place}/{i}")]
    if origin is dict and isinstance(value, dict):
        return [found for key, item in value.items() for found in problems(item, arguments[1], f"{place}/{key}")]
    if origin is Literal:
        return [] if value in arguments else [f"{place}: {value!r} is none of {arguments}"]
    if of in PLAIN:
        fits = isinstance(value, PLAIN[of]) and (of is bool) == isinstance(value, bool)
        return [] if fits else [f"{place}: {value!r} is no {of.__name__}"]
    if inspect.isclass(of) and issubclass(of, Enum):
        choices = [one.value for one in of]
        return [] if value in choices else [f"{place}: {value!r} is none of {choices}"]
    if hasattr(of, "to_json") and isinstance(value, dict):
        return _object_problems(value, of, place)
    return [f"{place}: {value!r} is no {of}"]


def _object_problems(value: dict[str, Any], of: type, place: str) -> list[str]:
    attributes, required = _keys(of)
    hints = get_type_hints(of, vars(sys.modules[of.__module__]))
    found = [f"{place}: {key} is missing" for key in required - value.keys()]
    for key, item in value.items():
        if key not in attributes:
            found.append(f"{place}/{key} is unknown to {of.__name__}")
        else:
            found += problems(item, hints[attributes[key]], f"{place}/{key}")
    return found


def _keys(of: type) -> tuple[dict[str, str], set[str]]:
    """Keys in JSON with the attributes that they stand for, and those which are always written."""
    source = inspect.getsource(of.to_json)  # type: ignore[attr-defined]
    always = dict(re.findall(r'^ +"(\w+)": self\.(\w+),$', source, re.MULTILINE))
    sometimes = dict(re.findall(r'payload\["(\w+)"\] = self\.(\w+)$', source, re.MULTILINE))
    assert always or sometimes or "payload: dict[str, object] = {\n        }" in source, of
    return always | sometimes, set(always)
