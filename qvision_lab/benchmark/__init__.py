"""What the model costs: parameters, time and memory, measured here."""
