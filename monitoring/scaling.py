"""`python -m monitoring.scaling X FILE`: rules or Alertmanager's configuration with all times X times shorter.

For tests and demonstrations, which cannot wait for half an hour: durations (`5m` in ranges, offsets, `for`,
`group_wait`) and numbers before "# seconds" are divided by X, everything else stays. So what is shown is the rules
themselves, and not a copy of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 31536000.0}
DURATION = r"(?:\d+(?:ms|[smhdwy]))+"
TIME_KEYS = {
    *("for", "keep_firing_for", "interval", "scrape_interval", "scrape_timeout", "evaluation_interval"),
    *("group_wait", "group_interval", "repeat_interval", "resolve_timeout", "refresh_interval"),
}


def seconds_of(duration: str) -> float:
    """`1h30m` in seconds."""
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdwy])", duration))


def scaled_duration(duration: str, times: float, least: float = 0.0) -> str:
    """`5m` ten times shorter is `30000ms`."""
    return f"{max(least, seconds_of(duration) / times) * 1000:.0f}ms"


def scaled_expression(expression: str, times: float, least: float = 0.0) -> str:
    """PromQL with shorter ranges, offsets and numbers of seconds."""

    def shorter(match: re.Match[str]) -> str:
        return match[1] + scaled_duration(match[2], times, least) + match[3]

    expression = re.sub(rf"(\[)({DURATION})(\])", shorter, expression)
    expression = re.sub(rf"(\boffset\s+)({DURATION})(\b)", shorter, expression)
    return re.sub(r"(\d+)(?= # seconds\b)", lambda match: f"{max(least, int(match[1]) / times):g}", expression)


def scaled(value: Any, times: float, least: float = 0.0) -> Any:
    """The same for all that a YAML file holds.

    Args:
        least: seconds that no time becomes shorter than; three scrapes are what a range needs to show anything.
    """
    if isinstance(value, list):
        return [scaled(item, times, least) for item in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, item in value.items():
        if key == "expr":
            out[key] = scaled_expression(item, times, least)
        elif key in TIME_KEYS:
            out[key] = scaled_duration(item, times, least)
        else:
            out[key] = scaled(item, times, least)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m monitoring.scaling", description=__doc__)
    parser.add_argument("times", type=float, help="how many times shorter")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.times <= 0:
        print("error: times must be above 0", file=sys.stderr)
        return 2
    print(yaml.safe_dump(scaled(yaml.safe_load(args.file.read_text(encoding="utf-8")), args.times), sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
