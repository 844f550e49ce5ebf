"""What README.md prints works as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


LONG = (0, 1, 2, 5)  # they train, or sample in earnest
CASES = [pytest.param(b, id=f"block-{i}", marks=[pytest.mark.slow] if i in LONG else []) for i, b in enumerate(BLOCKS)]


@pytest.mark.parametrize("block", CASES)
def test_python_blocks_run_and_print_what_their_comments_say(block: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert run.stdout.splitlines() == promised


def test_the_first_screen_has_the_two_commands() -> None:
    first = README.splitlines()[:12]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_every_make_target_and_file_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (demo|test|check|bench|\w+)\b", " ".join(re.findall(r"`([^`]*)`", README)))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}"
    for name in re.findall(r"`((?:samplers|distill|tools|configs|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), f"README names {name}"
