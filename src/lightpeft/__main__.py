"""`python -m lightpeft` is the `lightpeft` command."""

from lightpeft.cli import main

if __name__ == "__main__":
    main()
