"""NumPyro models, imported as `probbp.models`; each has its guide where it needs one."""
