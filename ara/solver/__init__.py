"""The budget, the choices of every layer, and the exact solver."""
