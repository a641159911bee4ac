"""Figures as people read them, for the status page and `top`."""

from __future__ import annotations

from typing import Final

_BYTE_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COUNT_UNITS: Final = ("", "k", "M", "G", "T")


def bytes_text(size: float) -> str:
    """For example `1.5 MiB`."""
    unit = 0
    while abs(size) >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{_three_digits(size, unit)} {_BYTE_UNITS[unit]}"


def count_text(count: float) -> str:
    """For example `12.3k`; exact below 10000."""
    if abs(count) < 9999.5 and count == int(count):
        return str(int(count))
    unit = 0
    while abs(count) >= 999.5 and unit < len(_COUNT_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{_three_digits(count, unit)}{_COUNT_UNITS[unit]}"


def bits_text(bytes_per_second: float) -> str:
    """For example `8.00 Mbit/s`."""
    bits = 8 * bytes_per_second
    unit = 0
    while bits >= 999.5 and unit < len(_COUNT_UNITS) - 1:
        bits /= 1000
        unit += 1
    return f"{_three_digits(bits, unit)} {_COUNT_UNITS[unit]}bit/s"


def seconds_text(seconds: float) -> str:
    """For example `3d 4h`, `12m 5s`: the two largest units."""
    left = int(max(0.0, seconds))
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or size == 1:
            parts.append(f"{count}{name}")
    return " ".join(parts[:2])


def _three_digits(value: float, unit: int) -> str:
    if unit == 0:
        return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
