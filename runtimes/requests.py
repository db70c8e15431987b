"""What runs beside `Session.run`: requests for several threads, and requests whose inputs stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploykit.specs import Array, Feeds

if TYPE_CHECKING:
    from deploykit.runtimes.base import Session


class Request:
    """One of several independent requests over one loaded model: each for a thread of its own.

    Args:
        session: Whose model it runs; once that is closed, `run` fails.
        call: Runs the model once.
    """

    __slots__ = ("_call", "_session")

    def __init__(self, session: Session, call: Callable[[Feeds], dict[str, Array]]) -> None:
        self._session = session
        self._call = call

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; as `Session.run`, but while other requests of the same session run.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        try:
            return self._call(feeds)
        except Exception as exc:
            raise self._session.reason(feeds, exc) from exc


class Bound:
    """A request whose inputs lie on the device already: `run` copies nothing in and nothing out.

    Args:
        session: Whose model it runs; once that is closed, `run` fails.
        feeds: What is bound.
        run: Runs the model once and waits until it is done.
        outputs: Copies the results of the latest run.
    """

    __slots__ = ("_feeds", "_outputs", "_run", "_session")

    def __init__(
        self, session: Session, feeds: Feeds, run: Callable[[], Any], outputs: Callable[[], dict[str, Array]]
    ) -> None:
        self._session = session
        self._feeds = feeds
        self._run = run
        self._outputs = outputs

    def run(self) -> None:
        """Run once more on the same inputs; the results stay on the device.

        Raises:
            InferenceError: The runtime failed.
        """
        try:
            self._run()
        except Exception as exc:
            raise self._session.reason(self._feeds, exc) from exc

    def outputs(self) -> dict[str, Array]:
        """Copies of the results of the latest run.

        Raises:
            InferenceError: The runtime failed.
        """
        try:
            return self._outputs()
        except Exception as exc:
            raise self._session.reason(self._feeds, exc) from exc
