"""A save that goes on behind, as a future whose error can't get lost."""

from __future__ import annotations

from concurrent.futures import Future


class PendingSave(Future[None]):
    """A future that knows whether anybody has asked how it ended."""

    _asked = False

    def result(self, timeout: float | None = None) -> None:
        super().exception(timeout)
        self._asked = True
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        self._asked = True
        return error

    def finish(self) -> None:
        """Waits for the end. Raises the error if nobody asked for it before."""
        asked = self._asked
        error = self.exception()
        if error is not None and not asked:
            raise error
