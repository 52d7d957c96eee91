"""Numbers as a reader wants them."""

from __future__ import annotations

import math
import time

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, digits: int = 4) -> str:
    """`2.345`, `12,346`, `0.00012`: as many digits as tell something; `-` for none."""
    if not math.isfinite(value):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def short(value: float) -> str:
    """For the marks of an axis: `200k`, `1.5M`, `0.002`, `1e-05`."""
    for unit, prefix in _PREFIXES:
        if abs(value) >= unit and (unit > 1e3 or abs(value) >= 1e4):
            return f"{value / unit:.4g}{prefix}"
    return f"{value:.4g}"


def loss_text(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def share(value: float) -> str:
    """`12.3 %`."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def clock(seconds: float) -> str:
    """A Unix time as `2026-11-21 05:56:12`, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if 0 < seconds < 1e11 else "-"
