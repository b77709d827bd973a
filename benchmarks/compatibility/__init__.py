"""Which interpreters and releases of other packages work: ``make compatibility``."""
