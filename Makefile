# The two commands a new user needs, on a machine with Python 3.11 or newer and its venv module:
#
#   make demo    makes a video; the last line printed is its path
#   make test    checks everything; the last line printed is pytest's
#
# and make report, which measures the miniature here and writes the README's table anew.
#
# PYTHON says which Python to use, PYTEST what pytest is told. TORCH says which PyTorch, installed first and by itself, so that a CPU build that pip
# can find is taken before anything else asks for torch.

PYTHON ?= python3
TORCH ?= 2.13.0

BIN := .venv/bin
INSTALLED := .venv/.installed
unexport CVX_ENGINES_DIR

.PHONY: demo test check report clean

demo: engines/mini/bundle.json
	@mkdir -p outputs
	$(BIN)/cvx-deploy run --model mini --prompt "a red circle moves to the right" --output outputs/demo.mp4 --contact-sheet outputs/demo.png

test check: $(INSTALLED)
	@scripts/check $(PYTEST)

report: $(INSTALLED)
	$(BIN)/python benchmarks/readme.py

engines/mini/bundle.json: $(INSTALLED)
	$(BIN)/cvx-deploy export --model mini

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: add PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==$(TORCH)
	$(BIN)/pip install -e ".[export,bench,openvino,tensorrt-rtx,serve,ray,dev]"
	@touch $@

clean:
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache dist engines/mini outputs/demo.mp4 outputs/demo.png
