"""``python -m ara_cli``."""

from ara_cli.app import main

if __name__ == "__main__":
    main()
