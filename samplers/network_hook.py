"""A diffusers hook on a pipeline's network that comes off again, wherever offloading has put the network's forward.

diffusers' registry calls hooks from the last registered inwards; accelerate's offloading takes the network's forward
off and puts it on again after every call of a pipeline, hooks included. Both have to find the network as it was.
"""

from collections.abc import Callable
from typing import Any

HOOKS = ("teleport", "feynman_kac_guidance")  # what this library attaches, one at a time


class NetworkHook:
    """A network whose calls go through `call(network, inner, args, kwargs)`, from `attach` to `detach`.

    inner: the forward that would have been called. name: in diffusers' registry of the network.
    """

    def __init__(self, name: str, call: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]):
        self.name, self._call = name, call
        self.network: Any = None  # while attached
        self._forward: Any = None  # the network's, while attached
        self._had: set[str] = set()

    def attach(self, network: Any) -> None:
        """Register the hook. Registered last, it is the outermost: caches and offloading see the calls it passes on."""
        from diffusers.hooks import HookRegistry, ModelHook

        call = self._call

        class Through(ModelHook):
            def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
                return call(module, self.fn_ref.original_forward, args, kwargs)

        self.network = network
        self._had = {name for name in ("forward", "_diffusers_hook") if name in vars(network)}
        HookRegistry.check_if_exists_or_initialize(network).register_hook(Through(), self.name)
        self._forward = network.forward

    def detach(self) -> None:
        """Give the network back as it was; nothing if the hook is not attached."""
        if self.network is None:
            return
        network, outer = self.network, self.network.forward
        registry = network._diffusers_hook
        inner = registry.get_hook(self.name).fn_ref.original_forward
        registry.remove_hook(self.name, recurse=False)
        if outer is not self._forward:  # wrapped since, or unwrapped, by accelerate's offloading
            network.forward = outer
            if vars(network).get("_old_forward") is self._forward:
                network._old_forward = inner
        elif not registry.hooks and "forward" not in self._had:
            del network.forward
        if not registry.hooks and "_diffusers_hook" not in self._had:
            del network._diffusers_hook
        self.network = None

    def reattach(self) -> None:
        """Called when a run begins: the hook goes on again if offloading put the network's own forward back."""
        wrapped = self.network.forward
        while wrapped is not None and wrapped is not self._forward:
            wrapped = getattr(wrapped, "__wrapped__", None)
        if wrapped is None:
            self.network._diffusers_hook.get_hook(self.name).fn_ref.original_forward = self.network.forward
            self.network.forward = self._forward
