"""Run one script by itself: ``python -m benchmarks.paper.fig04_threshold --quick`` measures it anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.paper.experiment import Experiment

__all__ = ["alone"]


def alone(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Measure anew, keep the result, and write the page."""
    parser = argparse.ArgumentParser(description=experiment.title)
    parser.add_argument("--quick", action="store_true", help="a little of it")
    parser.add_argument("--work", help="where stores are built and kept")
    given = parser.parse_args(arguments)
    from benchmarks.paper.__main__ import main  # it knows all scripts, so it imports this one

    chosen = [experiment.name, "--again", *(["--quick"] if given.quick else [])]
    return main([*chosen, *(["--work", given.work] if given.work else [])])
