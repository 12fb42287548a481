"""`python -m fathom.cli`."""

from fathom.cli.main import main

if __name__ == "__main__":
    main()
