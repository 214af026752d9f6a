"""Subcommands of `equipoise` that belong to the trainer."""
