"""What the modules of all tools share: options, switching on and off, and how one call is served."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ..errors import MergeError
from ._hooks import Hooks, NotServed
from ._stats import Calls, Stats

__all__ = ["Integration"]

Options = TypeVar("Options")


class Integration(Generic[Options]):
    """The state of one tool's integration.

    tool : its name in messages.
    install : gets this object, checks that the tool is as expected (:func:`refuse` if not) and replaces its seams
        with ``self.hooks.replace``. It is called with :attr:`options` set, and again when the options change.
    """

    def __init__(self, tool: str, install: Callable[[Integration[Options]], None]) -> None:
        self.tool = tool
        self.hooks = Hooks(tool)
        self.stats = Stats()
        self.options: Options | None = None
        self._install = install
        self._lock = threading.RLock()

    def enable(self, options: Options) -> None:
        """Switches on; with equal options a second time nothing happens, with others these take over."""
        with self._lock:
            if self.hooks.active and self.options == options:
                return
            before = self.options
            self.options = options
            try:
                with self.hooks.together():
                    self._install(self)
            except BaseException:
                self.options = None if before is None or not self.hooks.active else before
                raise

    def disable(self) -> None:
        """Every original back in its place; nothing happens if it is off."""
        with self._lock:
            self.options = None
            self.hooks.restore()

    @contextmanager
    def enabled(self, options: Options) -> Iterator[None]:
        """On inside; afterwards as before, with the options of before."""
        before = self.options
        self.enable(options)
        try:
            yield
        finally:
            if before is None:
                self.disable()
            else:
                self.enable(before)

    def calls(self) -> Calls:
        """What was served and what passed on since the start or the last reset."""
        return self.stats.snapshot()

    def served(
        self,
        name: str,
        ours: Callable[..., Any],
        tensor: Callable[..., str | None] | None = None,
    ) -> Callable[[Any], Any]:
        """A `make` for :meth:`Hooks.replace` that answers with `ours` and counts under `name`.

        ours : called with the arguments of the tool. Raises :class:`NotServed` before it changes anything, and then
            the original answers. Any other error is the caller's: a :class:`MergeError` with the name of the tensor.
        tensor : gets the same arguments and returns the tool's name of the tensor, for errors.
        """

        def make(original: Any) -> Any:
            @functools.wraps(ours)
            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    result = ours(*args, **kwargs)
                except NotServed as unserved:
                    reason = str(unserved)
                except MergeError as error:
                    if error.tensor is None and tensor is not None:
                        error.tensor = tensor(*args, **kwargs)
                    raise
                except Exception as error:
                    raise MergeError(
                        f"{name} failed in mergekernels: {type(error).__name__}: {error}",
                        code="integration.failed",
                        tensor=tensor(*args, **kwargs) if tensor is not None else None,
                        hint=f"disable() gives this call back to {self.tool}",
                    ) from error
                else:
                    self.stats.served(name)
                    return result
                self.stats.passed_on(name, reason)
                return original(*args, **kwargs)

            return call

        return make
