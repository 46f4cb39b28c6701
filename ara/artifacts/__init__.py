"""Artifacts: one file per kind, with its typed results, how it is written and how it is read."""
