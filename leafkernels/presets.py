"""Options that belong together, by name: for ``--preset`` of the command and ``preset=`` of ``LeafGRPOConfig``."""

PRESETS: dict[str, dict[str, int | float | str]] = {
    # K, B and the terms as in the settings of the reported runs that the LEAF authors released with their code
    # (rollout_budget_K, fork_budget_B, advantage_terms); the power is the paper's 1 / sqrt(n).
    "leaf-paper": {"num_generations": 8, "num_boundaries": 2, "terms": "both", "multiplicity_power": 0.5},
}
