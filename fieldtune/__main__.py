"""`python -m fieldtune` is the command line."""

from fieldtune.cli import main

if __name__ == "__main__":
    main()
