"""`python -m moelite.cli`."""

from moelite.cli.main import run

run()
