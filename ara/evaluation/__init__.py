"""Quality, speed and memory of a compressed model, compared with the dense one."""
