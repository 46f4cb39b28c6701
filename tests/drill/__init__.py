"""The reliability drill: every stage is killed, interrupted, starved of disk and fed flipped bits, and must not mind.

    make drill
    python -m tests.drill --kills 20 --flips 20 --stages truncate,eval

``stages.py`` says what is run, ``process.py`` how a process is forked and struck, ``disk.py`` where it works,
``result.py`` what counts as the same result, ``cases.py`` and ``flips.py`` what must hold, ``__main__.py`` counts.
What is promised, and the figures of a whole run: ``docs/reliability.md``.
"""
