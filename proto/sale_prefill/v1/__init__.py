"""The wire contract of sale-prefill; see the .proto files beside the generated modules."""
