"""Subcommands of the command line that need the server."""
