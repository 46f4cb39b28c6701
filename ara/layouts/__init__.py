"""How a low-rank layer is stored: what a rank costs, and the modules that hold it."""
