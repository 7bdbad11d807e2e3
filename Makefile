# What .ci/run does, in the environment that is active.
.PHONY: check quick lint test

check: lint test

# Two minutes of tests.
quick: lint
	pytest -m "not slow"

lint:
	.ci/lint

test:
	pytest
