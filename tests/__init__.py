"""The suite; mirrors hf_ssl."""

PATIENCE = 900  # seconds until a process counts as hung: no test may fail for being slow on a busy machine
