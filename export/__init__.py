"""Exports of compressed checkpoints to other runtimes; :mod:`export.targets` lists them."""
