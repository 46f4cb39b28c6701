"""Calibration and evaluation texts, from files and the hub to token windows."""
