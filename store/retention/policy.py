"""What is kept of a VM's generations, and how much it may store: the rules as they stand in a repository.

Pure. store.retention.rules says which generations the rules keep, store.retention.quotas what a quota allows.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

import msgspec

from base.errors import ConflictError, IntegrityError, one_line

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]

_SPAN = re.compile(r"(\d{1,6})([hdwmy])")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "m": 30 * 24, "y": 365 * 24}


class Policy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many of each to keep, and the `quota` in bytes; 0, None and empty keep none by that rule, and allow any size.

    As JSON this stands in records: `within` is an ISO 8601 duration there.
    """

    last: Count = 0
    hourly: Count = 0
    daily: Count = 0
    weekly: Count = 0
    monthly: Count = 0
    yearly: Count = 0
    within: timedelta | None = None
    tags: tuple[str, ...] = ()
    quota: Bytes | None = None

    @property
    def has_rules(self) -> bool:
        """Whether it says what to keep; where it does not, it must not be taken to mean that everything goes."""
        return msgspec.structs.replace(self, quota=None) != Policy()


class _KnownPolicy(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One that says nothing that is not understood here."""


def encode_policy(policy: Policy | None) -> msgspec.Raw:
    """As it stands in records; null for none."""
    return msgspec.Raw(msgspec.json.encode(policy))


def decode_policy(data: bytes | memoryview, of: str, *, whole: bool = False) -> Policy:
    """From JSON; `of` says whose it is. Rules that a newer Perdure has made are passed over, unless it must be `whole`:
    then, since they might keep more, ConflictError is raised. Raises IntegrityError for what is no policy."""
    try:
        policy = msgspec.json.decode(data, type=Policy)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise IntegrityError(f"policy for {of}", f"makes no sense: {one_line(error)}") from error
    if whole:
        try:
            msgspec.json.decode(data, type=_KnownPolicy)
        except (ValueError, RecursionError) as error:
            problem = (
                f"the policy for {of} has rules that this Perdure does not know: upgrade Perdure ({one_line(error)})"
            )
            raise ConflictError(problem) from error
    return policy


def parse_span(text: str) -> timedelta:
    """`2y5m7d3h`: years of 365 days, months of 30, weeks (w), days, hours. Raises ValueError."""
    parts = _SPAN.findall(text)
    if not parts or "".join(count + unit for count, unit in parts) != text:
        raise ValueError(f"{text!r} is no span of time: write it as in 2y5m7d3h")
    try:
        return timedelta(hours=sum(int(count) * _HOURS[unit] for count, unit in parts))
    except OverflowError:
        raise ValueError(f"{text!r} is longer than any span that can be counted") from None


def format_span(span: timedelta) -> str:
    """The same span as `parse_span` reads it, in days and hours."""
    days, hours = divmod(round(span.total_seconds() / 3600), 24)
    return "".join(f"{count}{unit}" for count, unit in ((days, "d"), (hours, "h")) if count) or "0h"
