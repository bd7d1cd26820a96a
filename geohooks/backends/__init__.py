"""How events are obtained from a model: torch forward hooks."""
