"""The command that examines the installation: doctor."""

from __future__ import annotations

import json as encoder

import typer

from softpick.experiment.failures import fail
from softpick.experiment.settings import DEVICES

__all__ = ["doctor"]


def doctor(
    device: str = typer.Option("auto", help=DEVICES),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Print versions, the kernels that typical calls take and why, and run each against fp64; exit code 1 if one is wrong. A
    bug report should contain this.
    """
    from softpick.doctor import examine
    from softpick.experiment.environment import chosen_device, device_line, missing_device

    chosen = chosen_device(device)
    missing = missing_device(chosen)
    if missing is not None:
        fail(f"device: {missing}")
    typer.echo(device_line(chosen), err=json)  # before the work, as every command
    report = examine(chosen, lambda name: typer.echo(f"running: {name}", err=True))
    typer.echo(encoder.dumps(report.to_json(), indent=2) if json else report.findings())
    if not report.fine:
        raise typer.Exit(1)
