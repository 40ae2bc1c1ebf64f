"""Admission, queue, chunk plan and cancellation: what runs next, and for whom."""
