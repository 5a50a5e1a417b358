# Both public targets work in a fresh clone: they set up what is missing first.

# The path of the checkout may have any letters.
export LC_ALL = C.UTF-8

.PHONY: demo test setup check clean

demo: setup
	@.venv/bin/python examples/demo/run

# pytest is last, so that its own summary is the last line. A process for each core: tests share only the cache directory,
# which is made for that. In the order of their names: xdist's own puts files of few tests last, and those take longest.
test: setup check
	@guest/tests/run
	@.venv/bin/python -m tests.support.images
	@.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

setup:
	@scripts/setup

check: setup
	@scripts/check

# Guest images stay: they are shared by all checkouts, and `taskvm image` removes them.
clean:
	rm -rf build dist src/taskvm/_native .mypy_cache .pytest_cache .ruff_cache .hypothesis .venv/.setup-stamp
