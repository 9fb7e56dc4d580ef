"""Files, exceptions and processes: utilities without dependencies on the rest of the package."""
