# What .ci/run does, in the environment that is active.
.PHONY: check quick lint test ptx hub

check: lint test

# Without the tests that are marked slow.
quick: lint
	pytest -m "not slow"

# The linters and the docs site, with the versions of the environment that is active.
lint:
	ruff check .
	ruff format --check .
	mypy
	NO_MKDOCS_2_WARNING=1 python3 -m mkdocs build --strict --quiet --site-dir "$$(mktemp -d)"

test:
	pytest

# Every kernel as compiled for GPUs, executed on the CPU by more seeds than in tests: the table of docs/performance.md.
ptx:
	TRITON_INTERPRET=0 PYTHONPATH=. python tests/compiled_kernels.py --write --seeds 1 2 3 4 5 6 7 8 9 10 11 12

# A build for the Kernel Hub below hub/, for kernels.get_local_kernel(Path("hub")).
hub:
	python .ci/hub.py hub
