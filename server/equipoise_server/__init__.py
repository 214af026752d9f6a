"""The server of Equipoise."""
