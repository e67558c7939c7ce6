"""TOML whose errors have lines: tomllib gives values without places, so keys are looked up in the text again.

The look-up reads lines, not TOML: it runs on text that tomllib has accepted, and answers with the line of the
longest part of a key that stands at the start of a line. Pure but for one read.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from base.errors import ConfigurationError

_TABLE = re.compile(r"\s*(\[\[?)([^\[\]]+)\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=(.*)""")
_QUOTES = ('"""', "'''")


class Lines:
    """Where the keys of a TOML text are."""

    def __init__(self, text: str) -> None:
        self._at: dict[str, int] = {}
        counts: dict[str, int] = {}
        table, open_quote = "", ""
        for number, line in enumerate(text.split("\n"), 1):
            if open_quote:  # inside a text of several lines, where anything may look like a key
                if open_quote in line:
                    open_quote = ""
                continue
            header, key = _TABLE.fullmatch(line.rstrip()), _KEY.match(line)
            if header:
                table = _plain(header[2])
                if header[1] == "[[":
                    self._at.setdefault(table, number)
                    counts[table] = counts.get(table, -1) + 1
                    table = f"{table}[{counts[table]}]"
                self._at.setdefault(table, number)
            elif key:
                name = _plain(key[1])
                self._at.setdefault(f"{table}.{name}" if table else name, number)
                open_quote = next((each for each in _QUOTES if key[2].count(each) == 1), "")

    def of(self, key: str) -> int | None:
        """The line of a dotted key as `region[1].size`, or of what it is in; None if neither is there."""
        while key:
            if key in self._at:
                return self._at[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return None


def read_toml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The file's values, and where they are. Raises ConfigurationError."""
    try:
        text = path.read_bytes().decode()
        return tomllib.loads(text), Lines(text)
    except OSError as error:
        raise ConfigurationError(str(path), f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(str(path), "is not UTF-8 text", line=line) from error
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
        line = int(place[1]) if place and place[1] else max(text.count("\n") + (not text.endswith("\n")), 1)
        problem = message[: place.start()] if place else message
        raise ConfigurationError(str(path), problem[:1].lower() + problem[1:], line=line) from error
    except (ValueError, RecursionError) as error:  # a number with more digits, or tables deeper than Python takes
        raise ConfigurationError(str(path), f"cannot be understood: {' '.join(str(error).split())}") from error


def _plain(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
