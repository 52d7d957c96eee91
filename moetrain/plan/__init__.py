"""Memory, time and goodput of a run before it is launched, and one of its ranks simulated alone."""
