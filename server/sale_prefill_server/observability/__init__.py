"""Metrics and logs, fed by events; nothing else imports this package."""
