"""Artifacts: what one stage leaves in the workspace and later ones read, one file per kind."""
