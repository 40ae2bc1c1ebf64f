"""`sale-prefill evaluate`: what SALE attention costs a model's answers, measured against dense attention."""
