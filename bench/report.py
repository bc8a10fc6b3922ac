"""A benchmark's report: values with their targets, on the terminal and in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Row:
    """One value with its target; without `wanted`, for information only."""

    what: str
    value: float
    wanted: str = ""
    holds: bool = True
    # The variation of the value between rounds.
    noise: float = 0.0

    def show(self) -> None:
        verdict = ("yes" if self.holds else "NO") if self.wanted else ""
        noise = f"±{self.noise:.2f}" if self.noise else ""
        click.echo(f"{self.what:<62}{self.value:>9.3f} {noise:<6} {self.wanted:<20}{verdict}")


def show_machine() -> None:
    load = os.getloadavg()[0]
    click.echo(f"{NUM_CORES} cores, load {load:.1f}")
    if load > 0.5:
        click.echo("the machine is busy: other work distorts even the ratios")


def save(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    click.echo(f"\nalso in {os.path.relpath(path)}")
