"""Replacing and restoring attributes, counting, and what every integration shares; no tool is needed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import types

import pytest

from mergekernels.errors import DataError, MergeError, ToolError
from mergekernels.integrations._hooks import Hooks, NotServed, Stats, fail_open, refuse
from mergekernels.integrations._integration import Integration


def module():
    """A tool of one function that adds one."""
    made = types.ModuleType("tool")
    made.add = lambda x, y=1: x + y
    return made


def negated(original):
    """A replacement that is easy to tell from what it replaces."""
    return lambda *args, **kwargs: -original(*args, **kwargs)


class Tool:
    """Seams of every kind."""

    scale = 2

    def method(self, x):
        """Says so."""
        return x * self.scale

    @staticmethod
    def static(x):
        return x * 3

    @classmethod
    def klass(cls, x):
        return x * cls.scale * 5


class Heir(Tool):
    """Inherits all of it."""

    scale = 7


def test_a_module_and_back():
    tool, hooks = module(), Hooks("tool")
    original = tool.add
    assert not hooks.active
    hooks.replace(tool, "add", negated)
    assert hooks.active
    assert tool.add(1) == -2
    assert tool.add(1, y=4) == -5
    hooks.restore()
    assert tool.add is original
    assert not hooks.active


def test_twice_is_no_second_layer():
    tool, hooks = module(), Hooks("tool")
    original = tool.add
    hooks.replace(tool, "add", negated)
    hooks.replace(tool, "add", lambda original: lambda x: 10 * original(x))
    assert tool.add(1) == 20
    hooks.restore()
    assert tool.add is original


@pytest.mark.parametrize(("attribute", "argument", "expected"), [("method", 1, 2), ("static", 1, 3), ("klass", 1, 10)])
def test_attributes_of_a_class(attribute, argument, expected):
    hooks = Hooks("tool")
    raw = vars(Tool)[attribute]
    assert getattr(Tool(), attribute)(argument) == expected
    hooks.replace(Tool, attribute, negated)
    assert getattr(Tool(), attribute)(argument) == -expected
    hooks.restore()
    assert vars(Tool)[attribute] is raw


def test_what_a_class_inherits_is_inherited_again():
    hooks = Hooks("tool")
    hooks.replace(Heir, "method", negated)
    hooks.replace(Heir, "klass", negated)
    assert (Heir().method(1), Heir().klass(1)) == (-7, -35)
    assert (Tool().method(1), Tool().klass(1)) == (2, 10)
    hooks.restore()
    assert "method" not in vars(Heir)
    assert "klass" not in vars(Heir)
    assert Heir().method(1) == 7


def test_objects():
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        implementation: object

    class Slots:
        __slots__ = ("implementation",)

    for owner in (Frozen(abs), Slots()):
        if isinstance(owner, Slots):
            owner.implementation = abs
        hooks = Hooks("tool")
        hooks.replace(owner, "implementation", negated)
        assert owner.implementation(-4) == -4
        hooks.restore()
        assert owner.implementation is abs
    bound, hooks = Tool(), Hooks("tool")
    hooks.replace(bound, "method", negated)
    assert (bound.method(1), Tool().method(1)) == (-2, 2)
    hooks.restore()
    assert vars(bound) == {}


def test_a_class_is_replaced_by_a_class():
    tool, hooks = types.ModuleType("tool"), Hooks("tool")
    tool.Kind = Tool
    hooks.replace(tool, "Kind", lambda original: type("Ours", (original,), {}))
    assert isinstance(tool.Kind, type)
    assert issubclass(tool.Kind, Tool)
    hooks.restore()
    assert tool.Kind is Tool


def test_the_replacement_looks_like_the_original():
    import inspect

    hooks = Hooks("tool")
    hooks.replace(Tool, "method", negated)
    assert Tool.method.__name__ == "method"
    assert Tool.method.__doc__ == "Says so."
    assert list(inspect.signature(Tool.method).parameters) == ["self", "x"]
    hooks.restore()


def test_somebody_else_over_ours():
    tool, hooks = module(), Hooks("tool")
    original = tool.add
    hooks.replace(tool, "add", negated)
    ours = tool.add
    tool.add = theirs = lambda x: 100 + ours(x)
    assert tool.add(1) == 98
    with pytest.warns(RuntimeWarning, match="tool.add was replaced by somebody else") as said:
        hooks.restore()
    assert len(said) == 1
    assert tool.add is theirs
    assert tool.add(1) == 102  # through ours to the original
    hooks.restore()  # says nothing again
    # They take theirs away and leave what they had found, which is our guard: no second layer grows around it.
    tool.add = ours
    assert tool.add(1) == 2
    hooks.replace(tool, "add", negated)
    assert tool.add is ours
    assert tool.add(1) == -2
    hooks.restore()
    assert tool.add is original


def test_enabled_over_theirs():
    tool, hooks = module(), Hooks("tool")
    original = tool.add
    tool.add = theirs = lambda x: 100 + original(x)
    hooks.replace(tool, "add", negated)
    assert tool.add(1) == -102
    hooks.restore()
    assert tool.add is theirs


def test_what_is_missing_is_refused_and_all_is_undone():
    tool, hooks = module(), Hooks("tool")
    original = tool.add
    with pytest.raises(ToolError, match=r"tool was left untouched: tool has no attribute 'subtract'"), hooks.together():
        hooks.replace(tool, "add", negated)
        hooks.replace(tool, "subtract", negated)
    assert tool.add is original
    assert not hooks.active


def test_refused_and_failing_open(capsys):
    def enable():
        refuse("tool", "no such function")

    with pytest.raises(ToolError, match="tool was left untouched: no such function") as raised:
        enable()
    assert MergeError.from_dict(raised.value.to_dict()).to_dict() == raised.value.to_dict()
    assert fail_open("tool", enable) is False
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("mergekernels: tool runs without mergekernels: tool was left untouched")
    assert fail_open("tool", lambda: None) is True


def integration(tool, ours, tensor=None):
    """An integration of one function; its options are a number that `ours` may read."""
    made = Integration("tool", lambda self: self.hooks.replace(tool, "add", self.served("add", ours, tensor)))
    return made


def test_served_and_passed_on():
    def ours(x):
        if x > 5:
            raise NotServed("too large")
        return 1000 + x

    tool = module()
    made = integration(tool, ours)
    with made.enabled(None):
        assert [tool.add(x) for x in (1, 6, 2, 7)] == [1001, 7, 1002, 8]
    calls = made.calls()
    assert calls.served == {"add": 2}
    assert calls.passed_on == {"add": {"too large": 2}}
    assert str(calls).splitlines() == [
        "2 calls served by mergekernels, 2 by the tool itself",
        "  add: 2 served",
        "  add: 2 passed on: too large",
    ]
    assert tool.add(1) == 2
    assert made.calls() == calls  # what is off is not counted
    made.stats.reset()
    assert str(made.calls()) == "0 calls served by mergekernels, 0 by the tool itself"


def test_errors_name_the_tensor_and_nothing_falls_back():
    def ours(name):
        raise DataError("NaN") if name == "a" else ZeroDivisionError("by zero")

    tool = module()
    made = integration(tool, ours, tensor=lambda name: f"layers.{name}")
    with made.enabled(None):
        with pytest.raises(DataError, match=r"tensor 'layers.a': NaN"):
            tool.add("a")
        with pytest.raises(
            MergeError, match=r"tensor 'layers.b': add failed in mergekernels: ZeroDivisionError"
        ) as raised:
            tool.add("b")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert made.calls().served == made.calls().passed_on == {}


def test_the_tools_own_error_is_only_its_own():
    def ours(x):
        raise NotServed("never")

    tool = module()
    with integration(tool, ours).enabled(None), pytest.raises(TypeError) as raised:
        tool.add("text")
    assert raised.value.__context__ is None


def test_options_nest():
    tool = module()
    made = Integration("tool", lambda self: self.hooks.replace(tool, "add", lambda _: lambda x: x * self.options))
    original = tool.add
    made.enable(10)
    made.enable(10)
    with made.enabled(20):
        assert tool.add(1) == 20
        made.enable(30)
        assert tool.add(1) == 30
    assert tool.add(1) == 10
    made.disable()
    assert tool.add is original
    made.disable()


def test_a_failing_change_of_options_switches_off():
    tool = module()
    original = tool.add

    def install(self):
        self.hooks.replace(tool, "add", negated)
        if self.options == "bad":
            refuse("tool", "bad option")

    made = Integration("tool", install)
    made.enable("good")
    with pytest.raises(ToolError, match="bad option"):
        made.enable("bad")
    assert tool.add is original
    made.enable("good")
    assert tool.add(1) == -2
    made.disable()


def test_threads_share_counters():
    stats = Stats()

    def work():
        for _ in range(2000):
            stats.served("a")
            stats.passed_on("a", "why")

    threads = [threading.Thread(target=work) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert stats.snapshot().served == {"a": 8000}
    assert stats.snapshot().passed_on == {"a": {"why": 8000}}


def test_switching_while_called():
    tool = module()
    hooks = Hooks("tool")
    wrong, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            if tool.add(1) not in (2, -2):
                wrong.append(1)

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(300):
        hooks.replace(tool, "add", negated)
        hooks.restore()
    stop.set()
    thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_counts_from_zero():
    code = """
import os, sys
from mergekernels.integrations._hooks import Stats
stats = Stats()
stats.served("a")
stats._lock.acquire()  # as if another thread were counting at the moment of the fork
child = os.fork()
if child == 0:
    stats.served("b")
    os._exit(0 if stats.snapshot().served == {"b": 1} else 1)
stats._lock.release()
assert os.waitpid(child, 0)[1] == 0
assert stats.snapshot().served == {"a": 1}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_it_is_light():
    code = """
import sys
import mergekernels.integrations._integration
print([m for m in ("torch", "triton", "numpy", "mergekit", "peft", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
