"""Typed calls: classes whose ``@rpc`` methods are called across the network as they would be in the process."""
