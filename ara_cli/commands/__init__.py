"""One file per command: options → config → one library call → rendering."""
