"""Train a model with a seeded bug, or without one, in one process and on the ranks of a pool, and compare the variants."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from stratagem.cli.parity.comparing import compare_all
from stratagem.cli.parity.report import ParityReport, Verdict
from stratagem.cli.parity.training import train_variant
from stratagem.cli.parity.variants import ParitySettings, Variant, variants_for
from stratagem.config import Config
from tests.support.ranks import Ranks
from tests.support.seeded_bugs.bugs import BUGS, config_with

__all__ = ["Trial", "compare", "placed_in"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One comparison.

    Attributes:
        model: the name of the configuration.
        strategy: the class name of the strategy on two ranks.
        bug: the name of the bug; None for a run without one.
        relative: the size of the bug ``relative_error``.
        changes: changes of the configuration.
        settings: changes of the options of the command.
    """

    model: str
    strategy: str
    bug: str | None = None
    relative: float = 0.0
    changes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Config:
        """Return the configuration."""
        return config_with(self.model, self.bug, relative=self.relative, changes=self.changes)

    def options(self) -> ParitySettings:
        """Return the options of the command. Only runs with a bug in resuming are resumed, unless it is requested."""
        resumed = self.bug is not None and self.bug in BUGS and BUGS[self.bug].resumed
        defaults = {"steps": 4, "nproc": 2, "accumulate": (), "resumed": resumed, "strategies": (self.strategy,)}
        return ParitySettings(**{**defaults, **self.settings})


def compare(trial: Trial, ranks: Ranks) -> ParityReport:
    """Train the variants of a trial, and return their comparison."""
    config, settings = trial.config(), trial.options()
    variants = [variant for variant in variants_for(config, settings) if variant.key.split("_")[-1] != "again"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_batch_norms = 0
        for variant in variants:
            if variant.nproc == 1:
                num_batch_norms = max(num_batch_norms, train_variant(config, variant, settings, folder, epoch_length=8))
        ranks.run_within(180, _train_on_ranks, trial, variants, folder)
        return compare_all(str(trial), config, settings, variants, folder, num_batch_norms, None)


def _train_on_ranks(trial: Trial, variants: list[Variant], folder: Path) -> None:
    for variant in variants:
        if variant.nproc > 1:
            train_variant(trial.config(), variant, trial.options(), folder, epoch_length=8)


def placed_in(report: ParityReport) -> list[str]:
    """Return the parts of the step in which a comparison found something; empty if it found nothing."""
    parts = [str(finding.part) for finding in report.findings]
    for result in report.results:
        first = result.comparison.first if result.comparison is not None else None
        if result.verdict is Verdict.DIFFERENT and first is not None:
            parts.append("/".join(str(part) for part in (*first.also_possible, first.part)))
    return list(dict.fromkeys(parts))
