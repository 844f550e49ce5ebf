"""A live diffusers scheduler under a subclass of its own name: pipelines keep, save and copy it as the stock one."""

from typing import Any


class LiveScheduler:
    """A scheduler that behaves otherwise from `attach` to `detach`; kinds of it give `_subclass`.

    scheduler: the instance; stock: its class. Copies of the instance are to behave as stock: members check for it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.stock = scheduler, type(scheduler)
        self._keys: set[str] = set()

    def attach(self) -> None:
        """Give the scheduler its subclass."""
        self._keys = set(vars(self.scheduler))
        self.scheduler.__class__ = self._subclass()

    def detach(self) -> None:
        """Give the scheduler its class back, and no attribute that it did not have."""
        self.scheduler.__class__ = self.stock
        for name in vars(self.scheduler).keys() - self._keys:
            delattr(self.scheduler, name)

    def _subclass(self) -> type:
        raise NotImplementedError

    def _named(self, members: dict[str, Any]) -> type:
        """A subclass with these members, under the stock class's name, so that what a pipeline saves is what it was."""
        stock = self.stock
        about = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        return type(stock.__name__, (stock,), members | about)
