"""The command ``amil``."""

import sys


def main():
    """Entry point; a missing dependency ends with a message that names the extra to install."""
    try:
        from amil_fast.cli.app import app
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "amil_fast":
            raise
        sys.exit(f"amil: the command line needs the package {error.name!r}: pip install 'amil_fast[all]'")
    app()
