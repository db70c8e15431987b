"""Knowledge distillation: a smaller network learns to answer as a larger one does.

`derive` makes a student out of a teacher's config and weights; `plan` decides what of the two is compared; `losses` are
the distances; `distiller` holds the student with what is learned beside it, and computes the loss of a batch; `cache`
has a teacher's answers kept. Training itself is `deploykit.optimizers.training`.
"""

from __future__ import annotations

from deploykit.optimizers.distillation.config import KINDS, DistillConfig, check_distill_config
from deploykit.optimizers.distillation.derive import Derivation, Derived, derive_student, parse_derivation

__all__ = [
    "KINDS",
    "Derivation",
    "Derived",
    "DistillConfig",
    "check_distill_config",
    "derive_student",
    "parse_derivation",
]
