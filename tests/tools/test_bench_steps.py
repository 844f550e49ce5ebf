"""The benchmark of students of several steps, on two updates of each."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_steps import steps_table


@pytest.mark.slow
def test_a_row_has_what_was_measured(tmp_path: Path) -> None:
    here = Path(__file__).parents[2]
    own = tmp_path / "seed-0"
    words = ["teach", "--config", "configs/digits-teacher.yaml", "--steps", "2", f"--run={own}/teacher"]
    subprocess.run([sys.executable, "-m", "distill.cli", *words], check=True, cwd=here, stdout=subprocess.DEVNULL)
    (own / "teacher.seconds").write_text("1.0")
    table = steps_table(tmp_path, [0, 1], arms=((1, 1), (2, 1)), updates=2)
    one, two = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert (one[:2], two[:2]) == (["1", "1"], ["2", "1"])
    assert one[5] == one[6].split(" ± ")[0]  # of one step what it makes is all there is
    assert len(two[5].split(", ")) == 2
    values = [float(value) for row in (one, two) for cell in row[2:] for value in re.findall(r"[\d.]+", cell)]
    assert len(values) == 2 * 8 + 1 + 2  # four means with their spreads each, and one mean a step
    assert min(float(row[k].split()[0]) for row in (one, two) for k in (2, 3, 6)) > 0
    shutil.rmtree(own / "teacher")
    assert steps_table(tmp_path, [0, 1], arms=((1, 1), (2, 1)), updates=2) == table  # nothing is made again
