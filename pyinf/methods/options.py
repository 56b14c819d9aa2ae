"""Options of methods: their defaults, what they mean, and the check that each value passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyinf.errors import ConfigError

__all__ = ["Option", "choice", "count", "flag", "number", "settle"]

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """An option of a method: its default, one line of help, and a check that returns the value to use or raises
    ``ConfigError``.
    """

    default: Any
    help: str
    check: Check


def count(low: int = 1, none: bool = False) -> Check:
    """A whole number of at least ``low`` (or None)."""

    def check(name: str, value: Any) -> Any:
        if value is None and none:
            return None
        found = int(value) if isinstance(value, str) and value.strip().isdigit() else value
        if isinstance(found, bool) or not isinstance(found, int) or found < low:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        return found

    return check


def number(low: float, high: float = float("inf"), none: bool = False, inclusive: bool = False) -> Check:
    """A finite number above ``low`` (or at it, with ``inclusive``) and below ``high``, or None."""

    def check(name: str, value: Any) -> Any:
        if value is None and none:
            return None
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if isinstance(value, bool) or not ((low <= found if inclusive else low < found) and found < high):
            bound = f"at least {low}" if inclusive else f"above {low}"
            bound += "" if high == float("inf") else f" and below {high}"
            raise ConfigError(f"{name} is {value!r}; it must be a number {bound}")
        return found

    return check


def flag(name: str, value: Any) -> bool:
    """True or false."""
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return text == "true"


def choice(*values: Any) -> Check:
    """One of some values."""

    def check(name: str, value: Any) -> Any:
        if value not in values:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(str, values))}")
        return value

    return check


def settle(method: str, options: Mapping[str, Option], common: Mapping[str, Any], given: Mapping[str, Any]) -> dict:
    """Every option in force: the common ones (checked elsewhere) and the method's own, checked.

    Raises:
        ConfigError: an option that the method does not have, or a value that cannot work.
    """
    unknown = sorted(set(given) - set(common) - set(options))
    if unknown:
        names = ", ".join([*options, *common])
        raise ConfigError(f"unknown option '{unknown[0]}' for method '{method}'; available: {names}")
    out = {name: given.get(name, default) for name, default in common.items()}
    for name, option in options.items():
        out[name] = option.check(name, given[name]) if name in given else option.default
    return out
