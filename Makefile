# What a change has to pass. Needs ruff and mypy installed: pip install -r tests/requirements.txt
.PHONY: check
check:
	ruff format --check .
	ruff check .
	mypy finetune
	bash run_tests.sh
