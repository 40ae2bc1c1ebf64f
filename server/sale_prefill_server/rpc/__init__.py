"""Servicers: messages in, domain objects out, no decisions."""
