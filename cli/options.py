"""Options that several commands read the same way."""

from __future__ import annotations

import json

import click

ROLES = ("actin", "tubulin", "dna")


def parse_channels(text: str | None) -> dict[str, int] | None:
    """ "actin=0,tubulin=1,dna=2" -> {"actin": 0, ...}; None stays None. Raises click.BadParameter with the repair."""
    if text is None:
        return None
    channels: dict[str, int] = {}
    for part in text.split(","):
        role, _, index = part.partition("=")
        role = role.strip().lower()
        if role not in ROLES or not index.strip().isdigit():
            raise click.BadParameter(
                f"{part!r}: write role=index with a role of {', '.join(ROLES)}, e.g. actin=0,tubulin=1,dna=2"
            )
        if role in channels or int(index) in channels.values():
            raise click.BadParameter(f"{part!r}: each role and each channel once")
        channels[role] = int(index)
    return channels


def parse_range(text: str | None) -> tuple[float, float] | None:
    """ "0,4095" -> (0.0, 4095.0); None stays None. Raises click.BadParameter with the repair."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: write LOW,HIGH in stored values, e.g. 0,4095") from None
    if not low < high:
        raise click.BadParameter(f"{text!r}: the first value must be below the second")
    return low, high


def parse_settings(pairs: tuple[str, ...]) -> dict[str, object]:
    """("steps=10", "weights=raw") -> {"steps": 10, "weights": "raw"}: numbers, true, false as such, the rest as text.

    Raises click.BadParameter for a pair without "=" or a name given twice.
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r}: write NAME=VALUE, e.g. steps=10")
        if name in settings:
            raise click.BadParameter(f"{name} is given twice")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
