"""KV bytes on the wire."""
