"""Plugs for trainers. Nothing in here is imported with ``leafkernels``; each module imports its trainer."""
