"""Workspaces: folders, manifests, checksums, locks, atomic writes, and the state of every result."""
