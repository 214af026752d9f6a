"""The client of Equipoise, a learning-policy service."""
