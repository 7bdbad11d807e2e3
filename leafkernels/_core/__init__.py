"""Parts of an operation, without mathematics: registration, backends, checks, precision, ranks."""
