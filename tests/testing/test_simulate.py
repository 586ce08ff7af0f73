"""The command, and the scenarios that come as examples."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from meshlib.testing.settings import load_scenario
from meshlib.testing.simulate import main

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "simulations").glob("*.toml"))
SMALL = 'title = "Small"\nduration = 2\n[servers]\ncount = 2\n[load]\nrate = 20\n'


def test_the_command_prints_a_table_and_writes_a_chart(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "meshlib.testing.simulate", "small.toml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Small: 2 s, seed 1, direct wire\n")
    assert done.stdout.endswith("chart: small.svg\n")
    assert ET.parse(tmp_path / "small.svg").getroot().tag.endswith("svg")


def test_options_come_before_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, chart = tmp_path / "small.toml", tmp_path / "other.svg"
    path.write_text(SMALL)
    assert main([str(path), "--seed", "5", "--wire", "mux", "--svg", str(chart)]) == 0
    assert capsys.readouterr().out.startswith("Small: 2 s, seed 5, mux wire\n")
    assert "seed 5" in chart.read_text()


def test_a_scenario_that_makes_no_sense_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(SMALL + "[[faults]]\nfault = 'crash'\nservers = 'x'\n")
    assert main([str(path), "--svg", str(tmp_path / "x.svg")]) == 2
    assert "servers='x': there is no x; there are servers/0, servers/1" in capsys.readouterr().err
    path.write_text("[servers]\n")
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: load: a scenario needs a table [load]\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path: Path) -> None:
    scenario = load_scenario(path)
    report = replace(scenario, duration=min(scenario.duration, 20.0)).run()
    assert report.success(until=min(fault.at for fault in scenario.faults) - 1) == 1
    assert report.success() > 0.5


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
