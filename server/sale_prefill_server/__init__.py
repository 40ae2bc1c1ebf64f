"""The service: SALE prefill of a Hugging Face causal LM behind gRPC, KV caches kept by session."""
