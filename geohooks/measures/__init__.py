"""Pure functions on tensors: no model, no hook, no state."""
