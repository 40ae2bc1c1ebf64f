"""What is lost by attending to less, on a user's own model: calibration, evaluation, and other methods beside it."""
