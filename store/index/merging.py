"""Planning the next step of merging runs: what to merge, and one step of it as puts and deletes.

A merge moves entries in order from its inputs to its output, at most one part a step. After each step the index is
complete: an entry is either still in an input, behind the point up to which that has been read, or in the output. So
a merge may be stopped anywhere, leaves nothing to clean up, and is continued by whoever plans next; and it
takes no space, since parts of inputs go as soon as they are used up. Plans are made on a snapshot and nothing here
writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from store.index import parts, runs
from store.index.lookup import IndexReader
from store.index.parts import DamagedValueError, Role, Run
from store.index.runs import Columns, Packs

if TYPE_CHECKING:
    import lmdb

FAN_MAX = 2 * runs.FANIN
"""Most runs merged at once, when many have piled up."""

_ROUNDS = 8
"""Most times that a step reads on because what it read was mostly dropped."""

Put = tuple[str, bytes, bytes]
Delete = tuple[str, bytes]


@dataclass(slots=True)
class Step:
    """A change to the index: holds if the values under the `expected` keys of `runs` are still these.

    `puts` are (database, key, value), `deletes` (database, key).
    """

    expected: dict[bytes, bytes | None]
    puts: list[Put] = field(default_factory=list)
    deletes: list[Delete] = field(default_factory=list)


@dataclass(slots=True)
class _Cursor:
    """How far a merge has read one of its inputs."""

    run: Run
    at: int
    skip: int

    @property
    def ended(self) -> bool:
        return self.at == len(self.run.fences)

    def forward(self, count: int) -> None:
        """Move on by so many entries."""
        self.skip += count
        while not self.ended and self.skip >= self.run.fences["entries"][self.at]:
            self.skip -= int(self.run.fences["entries"][self.at])
            self.at += 1


def plan(index: IndexReader, txn: lmdb.Transaction, mac_key: bytes) -> Step | None:
    """The next step of the merge that is worth most now; None if none is. Raises DamagedValueError, lmdb.Error."""
    state, dead = index.state(txn), index.dead(txn)
    everything = index.runs(txn)
    inputs = choose(everything, state.serial if len(dead) else 0)
    if inputs is None and len(dead):
        # No run holds anything of them any more, nor does any that is added meanwhile.
        return Step({parts.DEAD_KEY: index.get(txn, parts.DEAD_KEY)}, deletes=[("runs", parts.DEAD_KEY)])
    if inputs is None:
        return None
    step = Step({each.key(): index.get(txn, each.key()) for each in inputs})
    if inputs[0].merge:
        output = _output(everything, inputs[0].merge)
        step.expected[output.key()] = index.get(txn, output.key())
    else:
        step.expected[parts.STATE_KEY] = index.get(txn, parts.STATE_KEY)
        output = parts.new_run(state.next_run, state.serial, merge=state.next_run, role=Role.OUTPUT)
        inputs = [replace(each, merge=output.number, role=Role.INPUT) for each in inputs]
        state = replace(state, next_run=state.next_run + 1)
        step.puts.append(("runs", parts.STATE_KEY, parts.encode_state(state, mac_key)))
    columns, cursors = _advance(index, txn, inputs, dead)
    for cursor in cursors:
        step.deletes += removal(cursor.run, cursor.at)
        if not cursor.ended:
            left = cursor.run.trimmed(cursor.at, cursor.skip)
            step.puts.append(("runs", left.key(), parts.encode_run(left, mac_key)))
    if len(columns):
        output = output.extended(columns)
        step.puts += part_puts(output, columns, mac_key)
    if all(each.ended for each in cursors):
        output = replace(output, merge=0, role=Role.AT_REST)
    if len(output.fences) or output.role is Role.OUTPUT:
        step.puts.append(("runs", output.key(), parts.encode_run(output, mac_key)))
    else:  # all of it was dropped
        step.deletes.append(("runs", output.key()))
    return step


def choose(everything: list[Run], serial: int) -> list[Run] | None:
    """Inputs of the merge to go on with, or of the one to begin; None if all is well. Small ones first: they are quick.

    Where nothing else is to be done, a run that may hold entries of packs dropped up to `serial` is rewritten.
    """
    candidates: list[tuple[int, list[Run]]] = []
    for merge in {each.merge for each in everything if each.role is Role.INPUT}:
        inputs = [each for each in everything if each.merge == merge and each.role is Role.INPUT]
        candidates.append((runs.size_class(sum(each.entries for each in inputs)), inputs))
    at_rest = [each for each in everything if each.role is Role.AT_REST]
    for number in {runs.size_class(each.entries) for each in at_rest}:
        peers = [each for each in at_rest if runs.size_class(each.entries) == number]
        if len(peers) >= runs.FANIN:
            candidates.append((number, peers[:FAN_MAX]))
    if not candidates:
        candidates = [(each.entries, [each]) for each in at_rest if each.clean < serial]
    return min(candidates, key=lambda each: each[0])[1] if candidates else None


def removal(run: Run, count: int) -> list[Delete]:
    """Keys to delete when the first `count` parts of a run are not needed any more; with the last goes the run."""
    keys = [("parts", key) for at in range(count) for key in (run.prefix_key(at), run.body_key(at))]
    return [*keys, ("runs", run.key())] if count == len(run.fences) else keys


def part_puts(run: Run, columns: Columns, mac_key: bytes) -> list[Put]:
    """What stores these entries as the last part of a run."""
    prefix, body = parts.encode_part(run, columns, mac_key)
    return [("parts", run.prefix_key(-1), prefix), ("parts", run.body_key(-1), body)]


def living(columns: Columns, dead: Packs) -> Columns:
    """Without entries of dropped packs; a copy if there are any."""
    gone = runs.among(columns.location["pack"], dead)
    return columns.take(~gone) if gone.any() else columns


def _output(everything: list[Run], number: int) -> Run:
    for each in everything:
        if each.number == number:
            return each
    raise DamagedValueError(f"run {number}: is missing")


def _advance(
    index: IndexReader, txn: lmdb.Transaction, inputs: list[Run], dead: Packs
) -> tuple[Columns, list[_Cursor]]:
    """The next part of a merge, as a copy, and how far its inputs are then read."""
    cursors = [_Cursor(each, 0, each.skip) for each in inputs]
    pieces, wanted = [runs.EMPTY], parts.PART_ENTRIES
    for _ in range(_ROUNDS):
        windows = [_window(index, txn, each) for each in cursors]
        piece, consumed = runs.merge_front(
            [columns for columns, _ in windows], [ends for _, ends in windows], dead, wanted
        )
        for cursor, count in zip(cursors, consumed, strict=True):
            cursor.forward(count)
        pieces.append(piece)
        wanted -= len(piece)
        if wanted == 0 or all(each.ended for each in cursors):
            break
    return runs.join(pieces), cursors


def _window(index: IndexReader, txn: lmdb.Transaction, cursor: _Cursor) -> tuple[Columns, bool]:
    """The next entries of an input, at most a full part's worth, and whether they are its last."""
    pieces, at, skip, room = [runs.EMPTY], cursor.at, cursor.skip, parts.PART_ENTRIES
    while at < len(cursor.run.fences) and room:
        part = index.columns(txn, cursor.run, at)
        end = min(len(part), skip + room)
        pieces.append(part.cut(skip, end))
        room -= end - skip
        if end < len(part):
            break
        at, skip = at + 1, 0
    return runs.join(pieces), at == len(cursor.run.fences)
