"""Life cycle of retained KV caches: states, leases, expiry."""
