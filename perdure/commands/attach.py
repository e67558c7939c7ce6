"""`perdure attach`: supervise a VM that something else launched. `perdure detach`: leave it, with nothing of ours."""

from __future__ import annotations

from argparse import Namespace

from perdure.commands.vm import call_supervisor
from perdure.output import Output


def attach(options: Namespace) -> int:
    """`perdure attach`"""
    from perdure.supervision.running import attach_vm

    return attach_vm(options, Output(options.json, options.quiet))


def detach(options: Namespace) -> None:
    """`perdure detach`"""
    output = Output(options.json, options.quiet)
    done = call_supervisor(options.vm, "detach", {}, output)
    output.result(done, lambda: [f"{options.vm} detached: it runs on as it was launched"])
