"""Rows of several ranks; they live in ``leafkernels.rows.gather``."""

from leafkernels.rows.gather import GatheredGroups, gather_groups

__all__ = ["GatheredGroups", "gather_groups"]
