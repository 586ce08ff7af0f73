"""How: the steps around a call. Each is a layer of a stack, composes with ``>>``, and decorates functions."""
