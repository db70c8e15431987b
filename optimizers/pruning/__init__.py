"""Pruning of torch modules: fewer channels, or zeros in the weights.

Groups of channels that can only go together are found by Torch-Pruning (`groups.py`), ranked by what their loss
costs (`importance.py`), chosen (`allocation.py`) and taken out (`structured.py`); which share of them has to go for a
latency is searched in `search.py`. Weights are set to zero, and held there, by `sparse.py`.
"""

from __future__ import annotations

from deploykit.optimizers.pruning.config import METHODS, PruneConfig, check_prune_config
from deploykit.optimizers.pruning.counting import Layer, count_layers, count_parameters
from deploykit.optimizers.pruning.groups import check_keep, refuse_recurrent
from deploykit.optimizers.pruning.restoring import attributes_of, changed_attributes, restore_structure
from deploykit.optimizers.pruning.search import Found, Probe, find_ratio
from deploykit.optimizers.pruning.sparse import Masks, Zeros, count_zeros, make_sparse
from deploykit.optimizers.pruning.structured import Aim, Progressed, Pruned, prune_structured
from deploykit.optimizers.pruning.subject import Subject

__all__ = [
    "METHODS",
    "Aim",
    "Found",
    "Layer",
    "Masks",
    "Probe",
    "Progressed",
    "PruneConfig",
    "Pruned",
    "Subject",
    "Zeros",
    "attributes_of",
    "changed_attributes",
    "check_keep",
    "check_prune_config",
    "count_layers",
    "count_parameters",
    "count_zeros",
    "find_ratio",
    "make_sparse",
    "prune_structured",
    "refuse_recurrent",
    "restore_structure",
]
