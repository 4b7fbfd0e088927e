"""The thread that waits for the workers can be interrupted anywhere, so it must not hold their lock while it looks."""

from __future__ import annotations

import threading

from mergekernels.engine.scheduler import Scheduler


def test_looking_at_progress_takes_no_lock() -> None:
    scheduler: Scheduler[int] = Scheduler([0], 1, 0)
    seen: list[tuple[int, str]] = []
    with scheduler._changed:
        looker = threading.Thread(target=lambda: seen.append(scheduler._progress()), daemon=True)
        looker.start()
        looker.join(5)
        assert seen == [(0, "")]
