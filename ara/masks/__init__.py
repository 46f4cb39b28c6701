"""Trainable staircase masks (ARA, arXiv 2510.19389); arrives with learned ranks."""
