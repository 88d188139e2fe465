"""A package of its own, because dependencies of lmms-eval install another one called `tests`."""
