"""Planning: what a run will cost, and what faults will take from it, before it starts."""
