"""What ``python -m leafkernels`` is made of: reading and writing rollouts, their credit, and how it is shown."""
