"""The Makefile's targets in environments that nox keeps: ``nox -P 3.12`` tries another Python.

Nox is needed for nothing else; the Makefile stays the only place that says how the checks are run.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"  # the Makefile calls the environment's pip


def _make(session: nox.Session, *targets: str) -> None:
    session.run("make", f"VENV={session.virtualenv.location}", *targets, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; what follows ``--`` goes to pytest."""
    _make(session, "test", f"PYTEST_ARGS={' '.join(session.posargs)}")


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff, mypy and import-linter."""
    _make(session, "check")
