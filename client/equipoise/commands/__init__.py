"""Subcommands of the command line that need only the client."""
