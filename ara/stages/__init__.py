"""Stages: each loads, loops over modules, saves and reports; the mathematics is elsewhere."""
