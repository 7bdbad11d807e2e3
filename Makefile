# What .ci/run does, in the environment that is active.
.PHONY: check quick lint test hub

check: lint test

# Without the tests that are marked slow.
quick: lint
	pytest -m "not slow"

lint:
	.ci/lint

test:
	pytest

# A build for the Kernel Hub below hub/, for kernels.get_local_kernel(Path("hub")).
hub:
	python .ci/hub.py hub
