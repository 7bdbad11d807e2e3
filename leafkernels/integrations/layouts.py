"""The layouts of trainers; they live in ``leafkernels.rows.loops``."""

from leafkernels.rows.loops import next_tokens, pack, response_tokens, rolled_tokens, unpack

__all__ = ["next_tokens", "pack", "response_tokens", "rolled_tokens", "unpack"]
