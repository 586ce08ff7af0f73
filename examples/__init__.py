"""Things to run: ``python -m examples.echo``."""
