"""Artifacts: the typed results that one stage writes and later stages read, one file per kind."""
