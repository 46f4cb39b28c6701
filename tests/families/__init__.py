"""Every architecture of transformers that predicts the next token, tiny and random, through the whole pipeline.

``python -m tests.families`` writes what comes out of it to ``ara/models/families.json``, from which the page of
families is made. ``configs.py`` makes the tiny configs, ``probe.py`` takes one architecture through the pipeline,
``pool.py`` gives every architecture a process of its own.
"""
