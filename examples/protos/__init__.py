"""Stubs that grpclib's plugin has generated."""
