"""Tests that need a GPU, all marked ``gpu``. Where there is none they are skipped; ``make gpu-check`` runs them.

``ARA_TEST_DEVICE=cpu`` rehearses them on the CPU, so that their own code is known to work before a GPU is there.
"""
