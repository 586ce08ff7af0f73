"""``python -m meshlib.testing.simulate scenario.toml``: play a scenario, print its table, and draw its chart."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import ConfigurationError
from .network import WIRES
from .settings import load_scenario

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the result is the exit status: 0, or 2 for a scenario that makes no sense."""
    parser = argparse.ArgumentParser("python -m meshlib.testing.simulate", description=__doc__)
    parser.add_argument("scenario", type=Path, help="a TOML file; docs/simulator.md says what may stand in it")
    parser.add_argument("--svg", type=Path, help="where the chart goes (default: the name of the scenario, .svg, here)")
    parser.add_argument("--seed", type=int, help="instead of the scenario's own")
    parser.add_argument("--wire", choices=WIRES, help="instead of the scenario's own")
    options = parser.parse_args(arguments)
    try:
        scenario = load_scenario(options.scenario)
        changes = {key: value for key in ("seed", "wire") if (value := getattr(options, key)) is not None}
        report = replace(scenario, **changes).run()
    except ConfigurationError as error:
        print(error.message, file=sys.stderr)
        return 2
    chart = options.svg or Path(options.scenario.with_suffix(".svg").name)
    chart.write_text(report.svg(), "utf-8")
    print(report)
    print(f"chart: {chart}")
    return 0


if __name__ == "__main__":
    # What befalls simulated servers is no news for a log.
    logging.getLogger("meshlib").setLevel(logging.CRITICAL)
    sys.exit(main())
