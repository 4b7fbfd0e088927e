"""Replacing attributes of somebody else's code, and putting everything back."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import ToolError
from ._stats import Calls, Stats

__all__ = ["Calls", "Hooks", "NotServed", "Stats", "fail_open", "refuse"]

Make = Callable[[Any], Any]

_MISSING = object()


class NotServed(Exception):
    """Raised by a check for eligibility: the tool's own code shall answer this call.

    The text is the reason as :class:`Calls` counts it: short, and without numbers or names that vary from call to call.
    """


def refuse(tool: str, reason: str) -> NoReturn:
    """Raises the :class:`ToolError` of a tool that is not as this version of mergekernels knows it.

    Call it before anything is replaced, so that the tool is left as it was.
    """
    raise ToolError(
        f"{tool} was left untouched: {reason}",
        code="integration.refused",
        hint="The page docs/integrations.md names the versions that are known",
    )


def fail_open(tool: str, enable: Callable[[], None]) -> bool:
    """Runs `enable` for an activation that nobody watches: what is wrong is one line on stderr, and the tool runs on.

    Returns whether it worked.
    """
    try:
        enable()
    except Exception as error:
        print(f"mergekernels: {tool} runs without mergekernels: {error}", file=sys.stderr)
        return False
    return True


class _Hook:
    """One replaced attribute."""

    def __init__(self, owner: Any, attribute: str, raw: Any, own: bool) -> None:
        self.owner = owner
        self.attribute = attribute
        self.raw = raw
        self.own = own  # whether the owner had it itself: what was inherited is inherited again afterwards
        self.original: Any = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        self.guarded = callable(self.original) and not inspect.isclass(self.original)
        self.live: Any = None
        self.installed: Any = None

    def install(self, make: Make) -> None:
        self.live = made = make(self.original)
        if self.installed is not None and self.guarded:
            return  # the guard in place calls the new one from now on
        if self.guarded:
            made = self._guard()
        self.installed = type(self.raw)(made) if isinstance(self.raw, (staticmethod, classmethod)) else made
        _set(self.owner, self.attribute, self.installed)

    def _guard(self) -> Any:
        """What stands in the attribute: calls ours while live, and then the original for whoever still holds it."""

        @functools.wraps(self.original)
        def guard(*args: Any, **kwargs: Any) -> Any:
            return self.live(*args, **kwargs)

        guard.__mergekernels_hook__ = self  # type: ignore[attr-defined]
        return guard

    def remove(self) -> bool:
        """False if somebody else's replacement is there; it stays, and ours passes on to the original."""
        mine = _current(self.owner, self.attribute)[0] is self.installed
        self.live = self.original
        if mine and self.own:
            _set(self.owner, self.attribute, self.raw)
        elif mine:
            delattr(self.owner, self.attribute)
        return mine


class Hooks:
    """The attributes of one tool that are replaced at the moment. Threads may share it.

    tool : its name in messages.
    """

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self._lock = threading.RLock()
        self._hooks: dict[tuple[int, str], _Hook] = {}

    @property
    def active(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._hooks)

    def replace(self, owner: Any, attribute: str, make: Make) -> None:
        """Puts ``make(original)`` in place of ``owner.attribute``.

        owner : a module, a class or an object (a frozen dataclass too).
        make : gets the original, as a plain function where the owner is a class, and returns what takes its place. What
            it returns is called with the same arguments. If the attribute is replaced already, the new replacement
            takes the place of the old one and `make` gets the same original.

        Raises :class:`ToolError` if the owner has no such attribute.
        """
        with self._lock:
            key = (id(owner), attribute)
            hook = self._hooks.get(key)
            if hook is None:
                raw, own = _current(owner, attribute)
                if raw is _MISSING:
                    refuse(self.tool, f"{_name(owner)} has no attribute '{attribute}'")
                hook = _left_behind(raw) or _Hook(owner, attribute, raw, own)
            hook.install(make)
            self._hooks[key] = hook

    @contextmanager
    def together(self) -> Iterator[None]:
        """Several replacements or none: an error inside restores everything."""
        with self._lock:
            try:
                yield
            except BaseException:
                self.restore()
                raise

    def restore(self) -> None:
        """Puts every original back. What somebody else has replaced meanwhile stays theirs, which is warned of."""
        with self._lock:
            theirs = [hook for hook in reversed(self._hooks.values()) if not hook.remove()]
            self._hooks.clear()
        if theirs:
            places = ", ".join(f"{_name(hook.owner)}.{hook.attribute}" for hook in theirs)
            warnings.warn(
                f"{self.tool}: {places} was replaced by somebody else after mergekernels was enabled. That replacement "
                "stays; where it calls mergekernels, the call goes straight to the original.",
                RuntimeWarning,
                stacklevel=2,
            )


def _left_behind(raw: Any) -> _Hook | None:
    """The hook of an earlier enabling that somebody else has put back since: not a second layer around it."""
    function = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
    hook = vars(function).get("__mergekernels_hook__") if inspect.isfunction(function) else None
    return hook if isinstance(hook, _Hook) and hook.installed is raw else None


def _current(owner: Any, attribute: str) -> tuple[Any, bool]:
    """What the attribute holds, unbound where the owner is a class, and whether it is the owner's own."""
    space = getattr(owner, "__dict__", None)
    if space is not None and attribute in space:
        return space[attribute], True
    if inspect.isclass(owner):
        return inspect.getattr_static(owner, attribute, _MISSING), False
    # Without a dictionary the value lies in a slot, which can be written but not removed.
    return getattr(owner, attribute, _MISSING), space is None


def _set(owner: Any, attribute: str, value: Any) -> None:
    try:
        setattr(owner, attribute, value)
    except AttributeError:  # a frozen dataclass
        object.__setattr__(owner, attribute, value)


def _name(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    kind = owner if inspect.isclass(owner) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"
