"""`python -m gristmill.cli`."""

from gristmill.cli.main import app

if __name__ == "__main__":
    app()
