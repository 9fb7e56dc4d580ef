"""File and checkpoint utilities without dependencies on the rest of the package."""
