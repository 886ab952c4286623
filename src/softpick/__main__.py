"""``python -m softpick``, which torchrun can start."""

from softpick.cli import main

if __name__ == "__main__":
    main()
