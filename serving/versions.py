"""Which of a model's versions answer, by what is found in its directory: Triton's version policies."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from deploykit.errors import DeploykitError

VERSION = re.compile(r"[1-9]\d{0,17}")


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions answer.

    Attributes:
        latest: So many of the newest; 0 for all.
        only: These and no others; empty where `latest` decides.
    """

    latest: int = 1
    only: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """Read `latest:N`, `all`, or versions with commas between them.

        Raises:
            DeploykitError: It is none of them.
        """
        word, _, number = text.strip().partition(":")
        if word == "latest" and VERSION.fullmatch(number):
            return cls(int(number))
        if text.strip() == "all":
            return cls(0)
        only = [part.strip() for part in text.split(",")]
        if all(VERSION.fullmatch(version) for version in only):
            return cls(0, tuple(sorted(set(only), key=int)))
        raise DeploykitError(f"{text!r:.80} does not say which versions answer", expected="latest:N, all, or 1,3")

    def choose(self, found: Sequence[str], answering: Collection[str] = ()) -> tuple[str, ...]:
        """Versions that are to answer, oldest first.

        Args:
            found: Versions in the model's directory, oldest first.
            answering: What answers now: of named versions, one that was taken away goes on.
        """
        if self.only:
            return tuple(version for version in self.only if version in found or version in answering)
        return tuple(found[-self.latest :] if self.latest else found)

    @property
    def rule(self) -> str:
        """What keeps a version from answering."""
        if self.only:
            return f"the versions that answer are {', '.join(self.only)}"
        return "not the newest version" if self.latest == 1 else f"not one of the newest {self.latest} versions"
