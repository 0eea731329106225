"""Where record bytes live: one module a backend, found by name through `memodb.backends.registry`."""
