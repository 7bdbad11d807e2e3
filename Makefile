# What .ci/run does, in the environment that is active.
.PHONY: check quick lint test

check: lint test

# Without the tests that are marked slow.
quick: lint
	pytest -m "not slow"

lint:
	.ci/lint

test:
	pytest
