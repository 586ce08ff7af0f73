"""Where a request goes: targets, addresses, and the resolvers that watch them."""
