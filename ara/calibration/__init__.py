"""Calibration: which text is read, how it becomes token windows, and what is measured on them."""
