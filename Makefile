.PHONY: check

# What a change has to pass, as in continuous integration: format, lint, types, layers and the quick tests.
check:
	sh .ci/run
