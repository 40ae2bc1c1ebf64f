"""Model loading, one forward step, sampling."""
