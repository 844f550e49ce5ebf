"""A progress bar on a terminal, plain lines elsewhere; silent on all processes but the first."""

import os
import sys
from functools import cache


class Progress:
    """Called with the number of things done and their metrics; use it as a context."""

    def __init__(self, total: int, unit: str = "step") -> None:
        self._total, self._unit, self._silent = total, unit, not is_first()

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, unit=self._unit, disable=self._silent or not sys.stderr.isatty())
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, metrics: dict[str, float] | None = None) -> None:
        shown = {name: f"{value:.4g}" for name, value in (metrics or {}).items()}
        if self._bar.disable:
            if not self._silent:
                print(
                    f"{self._unit} {done}/{self._total}", *(f"{k} {v}" for k, v in shown.items()), sep="  ", flush=True
                )
        else:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)


@cache
def note(text: str) -> None:
    """Tells the user something about a run, once, on the first process."""
    if is_first():
        print(f"distill: note: {text}", file=sys.stderr)


def is_first() -> bool:
    """Whether this is the first of the processes of a launch."""
    return os.environ.get("RANK", "0") == "0"
