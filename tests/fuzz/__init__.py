"""A fuzzer of everything that somebody else may have written: ``python -m tests.fuzz`` (see :mod:`tests.fuzz.run`)."""
