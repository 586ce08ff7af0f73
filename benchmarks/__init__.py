"""What a call costs: meshlib next to plain anyio, grpcio.aio and grpclib, on one machine and in one run.

``python -m benchmarks`` runs the whole matrix, ``python -m benchmarks --quick`` one cell of it, and
``python -m benchmarks.layers`` takes a meshlib stack apart to show the price of each layer.
"""
