"""What SALE costs in fidelity, measured on a user's own model: `sale-prefill calibrate` and `sale-prefill evaluate`."""
