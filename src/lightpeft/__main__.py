"""`python -m lightpeft` is the `lightpeft` command."""

from lightpeft.app.cli import main

if __name__ == "__main__":
    main()
