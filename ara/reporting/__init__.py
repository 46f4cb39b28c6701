"""What people read about a compressed model."""
