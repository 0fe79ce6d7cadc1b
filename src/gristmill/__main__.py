"""`python -m gristmill`, as torchrun starts it."""

from gristmill.cli.main import app

if __name__ == "__main__":
    app()
