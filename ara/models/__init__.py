"""Models: where they come from, which linear layers they have, and compressed checkpoints."""
