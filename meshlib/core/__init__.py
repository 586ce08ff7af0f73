"""The ideas everything else is made of. This package imports nothing else of the house."""
