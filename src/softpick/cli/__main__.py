"""``python -m softpick.cli``."""

from softpick.cli import main

if __name__ == "__main__":
    main()
