"""The command line, for `python -m truestep`."""

from truestep.cli import main

if __name__ == "__main__":
    main()
